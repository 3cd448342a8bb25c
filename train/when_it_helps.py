"""When SUGAR helps: an activation against others over learning rates, initialisations and seeds.

    python train/when_it_helps.py --part rates --data cifar10 --output output/when_it_helps [--minutes 9] [--jobs 4]
    python train/when_it_helps.py --part rates --output output/when_it_helps --summary

A part is train/when_it_helps/PART.yaml: rates, fair (each at the best rate of `rates`), control, longer, dying and
finetune. It can be stopped at any time: the same command resumes it and skips finished cells. OUTPUT/PART has one JSON
file per cell; `--summary` prints the tables of the finished cells, draws the picture and collects the cells in
OUTPUT/PART.json.
"""

import argparse
import copy
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from timm.layers import create_act_layer
from torch import Tensor, nn

import timm_sugar
from timm_sugar.analysis.seeds import interval
from timm_sugar.analysis.units import count_units
from timm_sugar.data import (
    channel_counts,
    channel_statistics,
    decode,
    eval_transform,
    load_source,
    split_validation,
    stratified_sample,
)
from timm_sugar.files import write_file
from timm_sugar.init import pytorch_default_
from timm_sugar.surrogates import get_surrogate
from timm_sugar.terminal import Parser

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from bare_loop import COMPILE, BareLoop, place, together

from paper.table import replace_between, with_interval

RECIPES = Path(__file__).with_suffix("")
PARTS = ("rates", "fair", "control", "longer", "dying", "finetune")
MODELS = {"cifar": "resnet18_cifar_sugar_bsilu", "timm": "resnet18_sugar_bsilu"}


@dataclass(frozen=True)
class Cell:
    """One network to train.

    Attributes:
        activation: A name of timm's registry; in ``A@B`` the gradients of A are rescaled, layer by layer, to the norm
            of B's gradients for the same weights and images.
        lr: The highest learning rate.
        init: "timm" (kaiming_normal over fan_out) or "pytorch" (each layer's own `reset_parameters`).
        seed: Seed of initialisation, order and augmentation.
    """

    activation: str
    lr: float
    init: str
    seed: int

    def __str__(self) -> str:
        return f"{self.activation}-{self.init}-lr{self.lr:g}-seed{self.seed}"


@dataclass(frozen=True)
class Images:
    """Images from `place` and labels on the device: training (padded if the recipe augments), validation and test."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int


class PlainNet(nn.Module):
    """Convolutions of one width without normalisation or shortcuts, halving the resolution twice."""

    def __init__(self, depth: int, width: int, act_layer: str, classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for layer in range(depth):
            stride = 2 if layer in (depth // 3, 2 * depth // 3) else 1
            conv = nn.Conv2d(width if layer else 3, width, 3, stride, 1)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)
            layers += [conv, create_act_layer(act_layer)]  # type: ignore[list-item]
        self.features, self.fc = nn.Sequential(*layers), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, 3, H, W)."""
        logits: Tensor = self.fc(self.features(x).mean((2, 3)))
        return logits


class Composed(nn.Module):
    """SUGAR as plain operations that autograd differentiates; the reference for gradients."""

    def __init__(self, surrogate: str, alpha: float | None):
        super().__init__()
        self.entry, self.alpha = get_surrogate(surrogate), alpha

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(x) with the gradient of the surrogate."""
        alpha = self.entry.resolve_alpha(self.alpha)
        return torch.relu(x).detach() + (x - x.detach()) * self.entry.derivative(x.detach(), alpha)


def read_recipe(part: str, **overrides: Any) -> dict[str, Any]:
    """Return the settings of a part; values in `overrides` that are not None take precedence."""
    recipe: dict[str, Any] = yaml.safe_load((RECIPES / f"{part}.yaml").read_text(encoding="utf-8"))
    return recipe | {key: value for key, value in overrides.items() if value is not None}


def plan(recipe: dict[str, Any], output: Path) -> list[Cell]:
    """Return the cells, ordered by seed and then by rate.

    Raises:
        ValueError: a rate is the best of another part, which has no finished cell for that activation.
    """
    axes = (recipe["seeds"], recipe["rates"], recipe["inits"], recipe["activations"])
    cells = []
    for seed, rate, init, activation in itertools.product(*axes):
        if isinstance(rate, str):  # "best of PART"
            rate = best_rate(read_results(output / rate.split()[-1]), activation, init)
        cells.append(Cell(activation, rate, init, seed))
    return cells


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the result of each finished cell of a part, from its folder or from the file written by `gather`."""
    if not folder.is_dir() and folder.with_suffix(".json").is_file():
        stored = json.loads(folder.with_suffix(".json").read_text(encoding="utf-8"))
        return [stored["shared"] | cell for cell in stored["cells"]]
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def gather(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the cells of a part as one JSON file, one line per cell; values shared by all cells are written once."""
    shared = {key: value for key, value in results[0].items() if all(r.get(key) == value for r in results)}
    cells = [json.dumps({key: _rounded(r[key]) for key in r if key not in shared}) for r in results]
    lines = ",\n".join(cells)
    write_file(path, f'{{"shared": {json.dumps(shared)},\n"cells": [\n{lines}\n]}}\n')


def _rounded(value: Any) -> Any:
    """Round floats to six digits, more than the precision of accuracies on 10,000 images."""
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def best_rate(results: Sequence[dict[str, Any]], activation: str, init: str) -> float:
    """Return the learning rate with the highest mean validation accuracy after the last epoch."""
    found: dict[float, list[float]] = {}
    for result in results:
        if (result["activation"], result["init"]) == (activation, init):
            found.setdefault(result["lr"], []).append(result["val_top1"][-1])
    if not found:
        raise ValueError(f"no finished cell of {activation} with {init} initialisation: run --part rates first")
    return max(found, key=lambda rate: fmean(found[rate]))


def load_images(data: str, output: Path, side: int, limit: int | None) -> tuple[dict[str, Tensor], str]:
    """Decode a data set, or read the images that an earlier call cached in `output`.

    Returns:
        Pixels (uint8, (N, 3, side, side)) and labels of train, val and test, and a hash of all of them.
    """
    cached = output / f"images-{hashlib.sha256(f'{Path(data).absolute()} {side}'.encode()).hexdigest()[:12]}.npz"
    if not cached.is_file():
        source = load_source(data)
        train, val = split_validation(source.train, 0.1, 0)
        transform = eval_transform(
            {"input_size": (3, side, side), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
        )
        arrays: dict[str, np.ndarray] = {}
        for name, images in (("train", train), ("val", val), ("test", source.test)):
            arrays |= {name: decode(images, transform).numpy(), f"{name}_labels": images.labels}
        output.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_name(f"{os.getpid()}.tmp.npz")
        np.savez(temporary, **arrays)
        temporary.replace(cached)
    with np.load(cached) as stored:
        arrays = dict(stored)
    if limit is not None:
        kept = stratified_sample(arrays["train_labels"], limit, 0)
        arrays |= {name: arrays[name][kept] for name in ("train", "train_labels")}
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array).data)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, digest.hexdigest()[:16]


def on_device(arrays: dict[str, Tensor], device: torch.device, augment: bool) -> Images:
    """Copy the images from `load_images` to the device."""
    padding = {"train": 4 * augment}
    splits = [
        (place(arrays[name], device, padding.get(name, 0)), arrays[f"{name}_labels"].to(device))
        for name in ("train", "val", "test")
    ]
    mean, std = channel_statistics(channel_counts(arrays["train"]))
    return Images(splits[0], splits[1], splits[2], mean, std, int(arrays["train_labels"].max()) + 1)


def build(activation: str, init: str, seed: int, recipe: dict[str, Any], stem: str, classes: int) -> nn.Module:
    """Return the network of a cell; its weights depend only on init and seed."""
    torch.manual_seed(seed)
    if recipe["model"] == "plain":
        model: nn.Module = PlainNet(recipe["depth"], recipe["width"], activation, classes)
    else:
        model = timm_sugar.create_model(MODELS[stem], act_layer=activation, num_classes=classes)
    if init == "pytorch":
        torch.manual_seed(seed)
        pytorch_default_(model)
    return model


def with_activation(model: nn.Module, make: Callable[[timm_sugar.Sugar], nn.Module]) -> nn.Module:
    """Return a copy of `model` with each Sugar replaced by `make(sugar)`."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, timm_sugar.Sugar):
            twin.set_submodule(name, make(module))
    return twin


def check_gradient(model: nn.Module, images: Images, compile: str) -> float:
    """Compare SUGAR's gradient, as the loop computes it, with that of plain operations.

    Returns:
        Relative distance of the first convolution's gradients, in float32.

    Raises:
        RuntimeError: the gradient is not SUGAR's, or cannot be distinguished from ReLU's.
    """
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    few = (images.train[0][:32], images.train[1][:32])
    gradients = []
    twins = (
        (copy.deepcopy(model), compile),
        (with_activation(model, lambda sugar: Composed(sugar.surrogate, sugar.alpha)), "none"),
        (with_activation(model, lambda sugar: nn.ReLU()), "none"),
    )
    for twin, how in twins:
        loop = BareLoop(
            twin, *few, images.mean, images.std, epochs=1, batch_size=32, lr=0.0, dtype=torch.float32, compile=how
        )
        for _ in loop.train_epoch(0):
            pass
        gradients.append(loop.optimizer.param_groups[0]["params"][0].grad.double())
    torch.backends.cudnn.allow_tf32 = allowed
    ours, right, relu = gradients
    distance, from_relu = (ours - right).norm().item(), (relu - right).norm().item()
    if not distance <= min(0.01 * right.norm().item(), 0.1 * from_relu):
        raise RuntimeError(
            f"compile={compile!r}: the first convolution's gradient is {distance:.3g} from SUGAR's, whose norm is "
            f"{right.norm().item():.3g} and which is {from_relu:.3g} from ReLU's: nothing is trained"
        )
    return float(distance / right.norm().item())


def rescale_to(twin: nn.Module, model: nn.Module, dtype: torch.dtype) -> Callable[[Tensor, Tensor], None]:
    """Return an `adjust` that rescales each parameter's gradient to the norm of `twin`'s; they share parameters."""
    parameters = [*model.parameters()]
    owners = {name: twin.get_submodule(name) for name, _ in model.named_modules()}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        setattr(owners[module], leaf, parameter)

    def adjust(images: Tensor, labels: Tensor) -> None:
        with torch.autocast(images.device.type, dtype, dtype != torch.float32, cache_enabled=False):
            loss = F.cross_entropy(twin(images).float(), labels)
        wanted = torch._foreach_norm(torch.autograd.grad(loss, parameters))
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        tiny = torch.finfo(torch.float32).tiny
        factors = [w / n.clamp(min=tiny) for w, n in zip(wanted, torch._foreach_norm(gradients), strict=True)]
        torch._foreach_mul_(gradients, factors)  # type: ignore[arg-type]

    return adjust


def gradient_norms(model: nn.Module, images: Images, dtype: torch.dtype) -> dict[str, float]:
    """Return the norm of the weight gradient of the first and the last convolution, on the first 128 images."""
    twin = copy.deepcopy(model)
    few = (images.train[0][:128], images.train[1][:128])
    loop = BareLoop(twin, *few, images.mean, images.std, epochs=1, batch_size=len(few[1]), lr=0.0, dtype=dtype)
    for _ in loop.train_epoch(0):
        pass
    convolutions = [m for m in twin.modules() if isinstance(m, nn.Conv2d)]
    deepest = [m for m in convolutions if m.kernel_size != (1, 1)]
    norms = [m.weight.grad.norm().item() for m in (convolutions[0], deepest[-1])]  # type: ignore[union-attr]
    return {"first": norms[0], "last": norms[1]}


class Study:
    """Trains the cells of one part on one device."""

    def __init__(self, recipe: dict[str, Any], images: Images, settings: dict[str, Any], folder: Path, ends: float):
        self.recipe, self.images, self.settings, self.folder, self.ends = recipe, images, settings, folder, ends
        self.dtype = getattr(torch, settings["dtype"])
        self.longest = 0.0
        self.checked = cache(lambda activation: self._check(activation))

    def _build(self, cell: Cell, activation: str) -> nn.Module:
        model = build(activation, cell.init, cell.seed, self.recipe, self.settings["stem"], self.images.classes)
        return model.to(self.images.train[0].device)

    def _check(self, activation: str) -> None:
        if activation.startswith("sugar_"):
            distance = check_gradient(
                self._build(Cell(activation, 0.1, "timm", 0), activation), self.images, self.settings["compile"]
            )
            say(f"{activation}: the gradient is SUGAR's to {distance:.1e}")

    def _loop(self, model: nn.Module, lr: float, seed: int, epochs: int, **options: Any) -> BareLoop:
        images, recipe = self.images, self.recipe
        return BareLoop(
            model, *images.train, images.mean, images.std, epochs=epochs, batch_size=recipe["batch_size"], lr=lr,
            weight_decay=recipe["weight_decay"], seed=seed, dtype=self.dtype, compile=self.settings["compile"],
            steps=self.settings["steps"], **options,
        )  # fmt: skip

    def accuracy(self, loop: BareLoop, split: tuple[Tensor, Tensor]) -> Tensor:
        """Return the top-1 accuracy, a fraction of 1, on the device."""
        right = torch.cat([logits.argmax(1) for logits in loop.logits(split[0])]) == split[1]
        return right.float().mean()

    def base(self, seed: int) -> Path | None:
        """Train the network that `finetune` starts from, once per seed, and return the path of its weights."""
        if "base" not in self.recipe:
            return None
        path, base = self.folder / f"base-seed{seed}.pt", self.recipe["base"]
        if not path.is_file():
            model = self._build(Cell(base["activation"], base["lr"], base["init"], seed), base["activation"])
            loop = self._loop(model, base["lr"], seed, base["epochs"])
            for epoch in range(base["epochs"]):
                for _ in loop.train_epoch(epoch):
                    pass
            say(f"{path.name}: validation {100 * self.accuracy(loop, self.images.val).item():.2f}%")
            torch.save(model.state_dict(), path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        return path

    def train_cell(self, cell: Cell) -> Iterator[None]:
        """Train one network and write its file; yield after each step, and stop without a file if time is short."""
        began = time.monotonic()
        direction, _, size = cell.activation.partition("@")
        for activation in filter(None, (direction, size)):
            self.checked(activation)
        model = self._build(cell, direction)
        if (base := self.base(cell.seed)) is not None:
            model.load_state_dict(torch.load(base, weights_only=True))
        norms = gradient_norms(model, self.images, self.dtype)
        adjust = None
        if size:
            twin = self._build(cell, size).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
            adjust = rescale_to(twin, model, self.dtype)
        epochs = self.recipe["epochs"]
        loop = self._loop(model, cell.lr, cell.seed, epochs, adjust=adjust)
        losses: list[Tensor] = []
        accuracies: list[Tensor] = []
        diverged = False
        for epoch in range(epochs):
            first = time.monotonic()
            yield from loop.train_epoch(epoch)
            losses.append(loop.loss_sum / loop.steps)
            accuracies.append(self.accuracy(loop, self.images.val))
            if diverged := not math.isfinite(losses[max(0, epoch - 1)].item()):  # waiting for the last loss would block
                break
            if time.monotonic() + (epochs - epoch - 1) * 0.9 * (time.monotonic() - first) > self.ends:
                say(f"{cell}: given up after epoch {epoch + 1}, it would not end in time")
                return
        with count_units(model) as counts:
            test = self.accuracy(loop, self.images.test).item()
        units = [layer.units for layer in counts.layers.values()]
        result: dict[str, Any] = dict(
            activation=cell.activation, lr=cell.lr, init=cell.init, seed=cell.seed, settings=self.settings,
            train_loss=[loss if math.isfinite(loss) else None for loss in map(Tensor.item, losses)],
            val_top1=[accuracy.item() for accuracy in accuracies], test_top1=test, diverged=diverged,
            gradient_norms=norms, dead_channels=sum(int((u == 0).sum()) for u in units), channels=sum(map(len, units)),
            seconds=round(time.monotonic() - began, 2), torch=torch.__version__, device=device_name(model),
        )  # fmt: skip
        write_file(self.folder / f"{cell}.json", json.dumps(result) + "\n")
        self.longest = max(self.longest, result["seconds"])
        loss = "diverged" if diverged else f"loss {result['train_loss'][-1]:.3f}"
        val = f"validation {100 * result['val_top1'][-1]:.2f}%"
        say(f"{cell}: {loss}, {val}, test {100 * test:.2f}%, {result['seconds']:.0f} s")

    def cells(self, cells: Sequence[Cell]) -> Iterator[Iterator[None]]:
        """Yield the training of each unfinished cell, while there is time for another one."""
        for position, cell in enumerate(cells):
            if (self.folder / f"{cell}.json").is_file():
                continue
            if time.monotonic() + self.longest > self.ends:
                say(f"time is up: {len(cells) - position} cells not looked at; the same command goes on")
                return
            yield self.train_cell(cell)


def device_name(model: nn.Module) -> str:
    """Return the name of the GPU, or of the processor's vector instructions."""
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


Runs = dict[tuple[str, str], dict[float, dict[int, dict[str, Any]]]]


def by_cell(results: Sequence[dict[str, Any]]) -> Runs:
    """Return results by (init, activation), rate and seed; timm's initialisation and the order of `rates` first."""
    names = read_recipe("rates")["activations"]
    order = {name: place for place, name in enumerate(names)}
    by: Runs = {}
    for r in sorted(results, key=lambda r: (r["init"] != "timm", order.get(r["activation"], len(names)), r["lr"])):
        by.setdefault((r["init"], r["activation"]), {}).setdefault(r["lr"], {})[r["seed"]] = r
    return by


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Return the tables of a part in Markdown, in percent."""
    by = by_cell(results)
    rates = sorted({r["lr"] for r in results})
    lines = []
    if any(len(runs) > 1 for runs in by.values()):
        lines += [
            "Validation accuracy (%) after the last epoch by learning rate, mean over the seeds; the best in bold:",
            "",
        ]
        lines += _head(["init", "activation", *(f"{rate:g}" for rate in rates)], 2)
        for (init, activation), runs in by.items():
            best = best_rate(results, activation, init)
            shown = [_validation([*runs.get(rate, {}).values()], rate == best) for rate in rates]
            lines.append(f"| {init} | {activation} | {' | '.join(shown)} |")
        lines.append("")
    lines += [
        "Test accuracy (%) at the best rate, with 95% t-intervals over the seeds; differences are paired by seed:",
        "",
    ]
    head = ["init", "activation", "rate", "n", "test accuracy", "against relu", "by seed", "first gradient", "dead (%)"]
    lines += _head(head, 2)
    for (init, activation), runs in by.items():
        rate = best_rate(results, activation, init)
        best = runs[rate]
        gains = against_relu(results, activation, init)
        norm = fmean(r["gradient_norms"]["first"] for r in best.values())
        dead = 100 * fmean(r["dead_channels"] / r["channels"] for r in best.values())
        gain = with_interval([*gains.values()], "+") if gains else ""
        each = ", ".join(f"{gains[seed]:+.2f}" for seed in gains) if len(gains) > 1 else ""
        test = with_interval([100 * r["test_top1"] for r in best.values()])
        cells = [init, activation, f"{rate:g}", str(len(best)), test, gain, each, f"{norm:.3g}", f"{dead:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    one = results[0]
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(r["seed"] for r in results))
    lines += ["", f"{len(results)} networks, seeds {seeds}; torch {one['torch']}, {one['device']}."]
    return "\n".join(lines) + "\n"


def _head(names: Sequence[str], left: int) -> list[str]:
    return [f"| {' | '.join(names)} |", "| " + "--- | " * left + "--: | " * (len(names) - left - 1) + "--: |"]


def _validation(runs: Sequence[dict[str, Any]], best: bool) -> str:
    if not runs:
        return ""
    mean = f"{100 * fmean(r['val_top1'][-1] for r in runs):.2f}"
    return (f"**{mean}**" if best else mean) + " diverged" * any(r["diverged"] for r in runs)


def against_relu(results: Sequence[dict[str, Any]], activation: str, init: str) -> dict[int, float]:
    """Return the difference of the test accuracy to ReLU's in points, by seed, each at its best rate."""
    if activation == "relu" or not any((r["activation"], r["init"]) == ("relu", init) for r in results):
        return {}
    at = [
        {
            r["seed"]: 100 * r["test_top1"]
            for r in results
            if (r["activation"], r["init"], r["lr"]) == (name, init, rate)
        }
        for name in (activation, "relu")
        for rate in [best_rate(results, name, init)]
    ]
    return {seed: at[0][seed] - at[1][seed] for seed in at[0] if seed in at[1]}


def draw(results: Sequence[dict[str, Any]], picture: Path) -> None:
    """Draw test accuracy as `picture`.png and .pdf: by rate, or by seed if each activation has one rate."""
    from timm_sugar.analysis.palette import assign_styles
    from timm_sugar.analysis.plots import new_figure, save

    by = by_cell(results)
    inits = list(dict.fromkeys(init for init, _ in by))
    activations = list(dict.fromkeys(activation for _, activation in by))
    styles = dict(zip(activations, assign_styles(activations), strict=True))
    tests = {
        key: {rate: [100 * r["test_top1"] for r in seeds.values()] for rate, seeds in runs.items()}
        for key, runs in by.items()
    }
    if all(len(runs) == 1 for runs in tests.values()):
        figure, axes = new_figure(1, len(inits), 1.5 + 5.0 * len(inits), 0.9 + 0.36 * len(activations), sharey=True)
        for (init, activation), runs in tests.items():
            (values,) = runs.values()
            ax, row = axes[0, inits.index(init)], activations.index(activation)
            colour, marker = styles[activation].colour, styles[activation].marker
            spread = interval(values)
            ax.errorbar(fmean(values), row, xerr=spread, color=colour, marker=marker, markersize=7, capsize=4)
            ax.plot(values, [row + 0.25] * len(values), linestyle="", color=colour, marker=".", markersize=5)
            if activation == "relu":
                ax.axvline(fmean(values), color="0.6", linestyle=":", zorder=0)
        rates = {activation: next(iter(runs)) for (_, activation), runs in tests.items()}
        axes[0, 0].set_yticks(range(len(activations)), [f"{name}, {rates[name]:g}" for name in activations])
        axes[0, 0].set_ylim(len(activations) - 0.4, -0.6)
        for ax, init in zip(axes[0], inits, strict=True):
            ax.set(title=f"{init} initialisation", xlabel="test accuracy (%)")
        save(figure, picture)
        return
    figure, axes = new_figure(1, len(inits), 1.5 + 4.3 * len(inits), 4.2, sharey=True)
    ticks = sorted({rate for runs in tests.values() for rate in runs})
    for (init, activation), runs in tests.items():
        style = styles[activation]
        spread = [interval(values) or 0.0 for values in runs.values()]
        wide = 2.4 if activation in ("relu", "sugar_bsilu") else 1.2
        drawn = {"linestyle": style.dashes, "marker": style.marker, "markersize": 5, "linewidth": wide}
        error = spread if any(spread) else None
        axes[0, inits.index(init)].errorbar(
            [*runs], [*map(fmean, runs.values())], error, label=activation, capsize=2, color=style.colour, **drawn
        )
    for ax, init in zip(axes[0], inits, strict=True):
        ax.set(title=f"{init} initialisation", xlabel="learning rate", xscale="log")
        ax.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        ax.minorticks_off()
    axes[0, 0].set_ylabel("test accuracy (%)")
    handles: dict[str, Any] = {}
    for ax in axes[0]:
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, handlelength=4)
    save(figure, picture)


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError if a finished cell was trained with other settings."""
    for result in read_results(folder):
        for key, value in result["settings"].items():
            if settings.get(key) != value:
                raise ValueError(
                    f"{folder} was trained with {key} {value}, not {settings.get(key)}: take another --output"
                )


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="when_it_helps.py")
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--data", default="cifar10", help="a name, Hub id or folder, as in train/cifar.py")
    parser.add_argument("--output", type=Path, default=Path("output/when_it_helps"), metavar="DIR")
    parser.add_argument("--summary", action="store_true", help="train nothing; show the finished cells")
    parser.add_argument(
        "--into", type=Path, metavar="FILE", help="with --summary: write the tables into this Markdown file"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="end before this many minutes have passed")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="networks at once on the one GPU (default 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stem", choices=MODELS, help="default: cifar on a GPU, timm (far cheaper) on a CPU")
    parser.add_argument("--compile", choices=COMPILE, help="default: graph on a GPU, none on a CPU")
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the recipe's")
    parser.add_argument("--inits", nargs="+", choices=("timm", "pytorch"), help="default: the recipe's")
    parser.add_argument("--rates", type=float, nargs="+", help="default: the recipe's")
    parser.add_argument("--activations", nargs="+", help="default: the recipe's")
    parser.add_argument("--limit-train", type=int, metavar="N", help="training images (default all)")
    parser.add_argument("--steps", type=int, help="steps per epoch, for a trial (default all)")
    args = parser.parse_args(argv)
    ends = time.monotonic() + 60 * args.minutes
    device, folder = torch.device(args.device), args.output / args.part
    cuda = device.type == "cuda"
    try:
        if args.summary:
            if not (results := read_results(folder)):
                raise ValueError(f"{folder} holds no finished cell")
            shown = tables(results)
            print(shown)
            if args.into is not None:
                replace_between(args.into, args.part, shown)
            draw(results, args.output / args.part)
            if folder.is_dir():
                gather(results, args.output / f"{args.part}.json")
            return
        axes = {name: getattr(args, name) for name in ("seeds", "inits", "rates", "activations")}
        recipe = read_recipe(args.part, epochs=args.epochs, **axes)
        cells = plan(recipe, args.output)
        arrays, digest = load_images(args.data, args.output, 32, args.limit_train)
        if len(arrays["train"]) < recipe["batch_size"]:
            raise ValueError(f"{len(arrays['train'])} training images are fewer than a batch, {recipe['batch_size']}")
        settings = {key: value for key, value in recipe.items() if key not in axes} | dict(
            stem=args.stem or ("cifar" if cuda else "timm"), compile=args.compile or ("graph" if cuda else "none"),
            dtype="bfloat16" if cuda or torch.cpu._is_avx512_bf16_supported() else "float32", steps=args.steps,
            train_images=len(arrays["train"]), data=digest,
        )  # fmt: skip
        check_settings(folder, settings)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    torch.backends.cudnn.benchmark = True
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(recipe, on_device(arrays, device, recipe["augment"]), settings, folder, ends)
    done = sum((folder / f"{cell}.json").is_file() for cell in cells)
    say(f"{args.part}: {len(cells)} cells, {done} of them finished; {settings}")
    together(study.cells(cells), args.jobs)


if __name__ == "__main__":
    main()
