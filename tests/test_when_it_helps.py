"""The study of when SUGAR helps, and the bare loop that it trains with."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import timm_sugar
import when_it_helps as study
from tests.conftest import image_folder
from timm_sugar.data import normalize
from when_it_helps import BareLoop, Cell, Images, place, together

ROOT = Path(__file__).parents[1]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
RECIPE = {"model": "plain", "depth": 3, "width": 8}


def _images(count: int = 24, padding: int = 0) -> Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 3
    train = (place(pixels, torch.device("cpu"), padding), labels)
    return Images(train, train, train, MEAN, STD, 3)


def _network(activation: str) -> nn.Module:
    return study.build(activation, "timm", 0, RECIPE, "timm", 3)


def test_the_bare_loop_is_sgd_with_nesterov_momentum_a_cosine_and_decay_of_weights_alone():
    images, model, other = _images(), _network("relu"), _network("relu")
    loop = BareLoop(
        model, *images.train, MEAN, STD, epochs=2, batch_size=8, lr=0.1, weight_decay=0.01, seed=5, dtype=torch.float32
    )
    groups = [[p for p in other.parameters() if p.ndim > 1], [p for p in other.parameters() if p.ndim == 1]]
    optimizer = torch.optim.SGD(
        [dict(params=groups[0], weight_decay=0.01), dict(params=groups[1])], lr=0.1, momentum=0.9, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    pixels = images.train[0].permute(0, 3, 1, 2)
    for epoch in range(2):
        for _ in loop.train_epoch(epoch):
            pass
        order, losses = torch.randperm(24, generator=torch.Generator().manual_seed(1_000_003 * 5 + epoch)), []
        for batch in order.split(8):
            optimizer.zero_grad()
            loss = F.cross_entropy(other(normalize(pixels[batch], MEAN, STD)), images.train[1][batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        assert loop.loss_sum.item() / loop.steps == pytest.approx(sum(losses) / 3, rel=1e-5)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_crops_and_flips_are_those_of_each_image_and_the_same_for_a_seed_and_epoch():
    images = _images(padding=4)
    loops = [BareLoop(_network("relu"), *images.train, MEAN, STD, batch_size=8, dtype=torch.float32) for _ in range(2)]
    for loop in loops:
        next(loop.train_epoch(3))
    assert torch.equal(loops[0].draws, loops[1].draws)
    flips, tops, lefts = loops[0].draws.unbind(1)
    assert sorted(set(flips.tolist())) == [0, 1]
    assert 0 <= min(tops.min(), lefts.min()) < max(tops.max(), lefts.max()) <= 8
    for position, index in enumerate(loops[0].index.tolist()):
        top, left = tops[index].item(), lefts[index].item()
        crop = images.train[0][index, top : top + 32, left : left + 32].permute(2, 0, 1)
        wanted = normalize((crop.flip(2) if flips[index] else crop)[None], MEAN, STD)[0]
        torch.testing.assert_close(loops[0].batch()[position], wanted)


def test_loops_take_turns_and_the_next_starts_when_one_ends():
    seen: list[str] = []

    def loop(name: str, steps: int):
        for step in range(steps):
            seen.append(f"{name}{step}")
            yield

    together((loop(name, steps) for name, steps in (("a", 1), ("b", 3), ("c", 1))), 2)
    assert seen == ["a0", "b0", "b1", "b2", "c0"]


@pytest.mark.parametrize(("direction", "size"), [("sugar_bsilu", "relu"), ("relu", "sugar_bsilu")])
def test_the_control_has_the_direction_of_one_gradient_and_the_norms_of_the_other(direction, size):
    images, gradients = _images(), {}
    for name in ("relu", "sugar_bsilu", "both"):
        model = _network(direction if name == "both" else name)
        adjust = study.rescale_to(_network(size), model, torch.float32) if name == "both" else None
        loop = BareLoop(model, *images.train, MEAN, STD, batch_size=24, lr=0.0, dtype=torch.float32, adjust=adjust)
        next(loop.train_epoch(0))
        gradients[name] = [p.grad.double() for p in model.parameters()]
    assert gradients[size][0].norm() != pytest.approx(gradients[direction][0].norm().item(), rel=0.1)
    for both, along, norm in zip(gradients["both"], gradients[direction], gradients[size], strict=True):
        assert both.norm().item() == pytest.approx(norm.norm().item(), rel=1e-4)
        torch.testing.assert_close(both / both.norm(), along / along.norm(), rtol=1e-3, atol=1e-5)


def test_a_gradient_that_is_not_sugars_is_refused(monkeypatch):
    images = _images(32)
    for name in ("sugar_bsilu", "sugar_nelu"):
        assert study.check_gradient(_network(name), images, "none") < 1e-4
    monkeypatch.setattr(timm_sugar.Sugar, "forward", lambda self, x: torch.relu(x))
    with pytest.raises(RuntimeError, match="nothing is trained"):
        study.check_gradient(_network("sugar_bsilu"), images, "none")


def test_pytorch_initialisation_has_a_sixth_of_the_variance():
    variances = [
        study.build("relu", init, 0, {"model": "resnet18"}, "timm", 10).layer4[1].conv2.weight.var().item()
        for init in ("timm", "pytorch")
    ]
    assert variances[1] / variances[0] == pytest.approx(1 / 6, rel=0.01)


def test_the_best_rate_is_that_of_validation_and_each_rate_comes_for_all_activations(tmp_path):
    for activation, rate, accuracy in (("relu", 0.1, 0.4), ("relu", 0.01, 0.5), ("silu", 0.1, 0.6)):
        result = {"activation": activation, "init": "timm", "lr": rate, "val_top1": [0.9, accuracy], "test_top1": 0.0}
        (tmp_path / "rates").mkdir(exist_ok=True)
        (tmp_path / "rates" / f"{activation}{rate}.json").write_text(json.dumps(result))
    axes = {"seeds": [1, 2], "inits": ["timm"], "activations": ["relu", "silu"]}
    cells = study.plan(axes | {"rates": ["best of rates"]}, tmp_path)
    assert cells == [
        Cell(name, rate, "timm", seed) for seed in (1, 2) for name, rate in (("relu", 0.01), ("silu", 0.1))
    ]
    with pytest.raises(ValueError, match="run --part rates first"):
        study.plan(axes | {"rates": ["best of rates"], "activations": ["gelu"]}, tmp_path)


def test_the_interval_is_students():
    assert study.interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


def test_a_study_that_is_killed_goes_on(tmp_path, capsys):
    data = image_folder(tmp_path / "data", 150, ("train", "test"))
    command = (
        f"--part dying --data {data} --epochs 2 --rates 0.01 --seeds 42 --activations relu sugar_bsilu --device cpu"
    )
    started = subprocess.Popen(
        [sys.executable, study.__file__, *command.split(), "--output", tmp_path / "killed"], stderr=subprocess.DEVNULL
    )
    cells = [f"dying/{name}-timm-lr0.01-seed42.json" for name in ("relu", "sugar_bsilu")]
    first, until = tmp_path / "killed" / cells[0], time.monotonic() + 120
    try:
        while not first.is_file():
            assert time.monotonic() < until
            assert started.poll() is None
            time.sleep(0.02)
    finally:
        started.kill()
        started.wait()
    content = first.read_bytes()
    for folder in ("killed", "whole"):
        study.main([*command.split(), "--output", str(tmp_path / folder)])
    assert first.read_bytes() == content
    for cell in cells:
        killed, whole = (json.loads(Path(tmp_path, folder, cell).read_text()) for folder in ("killed", "whole"))
        assert {**killed, "seconds": 0} == {**whole, "seconds": 0}
        assert len(killed["train_loss"]) == 2
        assert killed["test_top1"] >= 1 / 3
    capsys.readouterr()
    (page := tmp_path / "page.md").write_text("before\n<!-- dying -->\n<!-- /dying -->\nafter\n")
    study.main(["--part", "dying", "--output", str(tmp_path / "whole"), "--summary", "--into", str(page)])
    shown = capsys.readouterr().out.rstrip()
    assert f"| timm | sugar_bsilu | 0.01 | 1 | {100 * whole['test_top1']:.2f} |" in shown
    assert page.read_text() == f"before\n<!-- dying -->\n\n{shown}\n\n<!-- /dying -->\nafter\n"
    assert (tmp_path / "whole" / "dying.png").is_file()
    folder = (tmp_path / "whole" / "dying").rename(tmp_path / "cells")
    gathered = study.read_results(tmp_path / "whole" / "dying")
    for cell, result in zip(gathered, study.read_results(folder), strict=True):
        assert study.tables([cell]) == study.tables([result])
        assert cell["train_loss"] == pytest.approx(result["train_loss"], rel=1e-5)
        assert {**cell, "train_loss": 0, "gradient_norms": 0} == {
            **study._rounded(result),
            "train_loss": 0,
            "gradient_norms": 0,
        }
    folder.rename(tmp_path / "whole" / "dying")
    with pytest.raises(SystemExit) as caught:
        study.main([*command.replace("--epochs 2", "--epochs 3").split(), "--output", str(tmp_path / "whole")])
    assert caught.value.code == 2
    assert "trained with epochs 2, not 3: take another --output" in capsys.readouterr().err


def test_the_pages_numbers_are_those_of_the_committed_cells():
    page = " ".join((ROOT / "docs" / "when-it-helps.md").read_text().split())
    results = {part: study.read_results(ROOT / "docs" / "when-it-helps" / part) for part in study.PARTS}
    for part, cells in results.items():
        assert " ".join(study.tables(cells).split()) in page, part
    found = {(r["init"], r["activation"], r["lr"]): r for r in results["rates"]}
    assert len(found) == 84

    def val(init: str, activation: str, rate: float | None = None) -> float:
        rate = study.best_rate(results["rates"], activation, init) if rate is None else rate
        return 100 * found[init, activation, rate]["val_top1"][-1]

    def over_inits(value: Callable[[str], float], form: str) -> list[str]:
        return [format(value(init), form) for init in ("timm", "pytorch")]

    timm, pytorch = over_inits(lambda i: val(i, "sugar_bsilu", 0.001) - val(i, "relu", 0.001), ".1f")
    assert f"is {timm} points above ReLU with timm's initialisation and {pytorch} with PyTorch's" in page
    timm, pytorch = over_inits(lambda i: val(i, "sugar_bsilu") - val(i, "relu"), "+.1f")
    assert f"{timm} points with timm's initialisation, {pytorch} with PyTorch's (one seed" in page

    def moves(init: str, activation: str) -> float:
        values = [val(init, activation, rate) for rate in (0.001, 0.003, 0.01, 0.03)]
        return max(values) - min(values)

    sugar, relu = (over_inits(lambda i, a=a: moves(i, a), ".1f") for a in ("sugar_bsilu", "relu"))
    ours = f"{sugar[0]} points with timm's initialisation and by {sugar[1]} with PyTorch's"
    assert f"{ours}, ReLU's by {relu[0]} and {relu[1]}" in page
    best = [max(val(init, name) for init in ("timm", "pytorch")) for name in ("sugar_bsilu", "relu")]
    assert f"{best[0]:.2f}%, is {best[1] - best[0]:.1f} points below ReLU's best, {best[1]:.2f}%" in page
    ratios = over_inits(
        lambda i: (
            found[i, "sugar_bsilu", 0.001]["gradient_norms"]["first"]
            / found[i, "relu", 0.001]["gradient_norms"]["first"]
        ),
        ".0f",
    )
    assert f"gradient is {ratios[0]} and {ratios[1]} times ReLU's" in page
    others = {name for _, name, _ in found} - {"sugar_bsilu"}
    leads = over_inits(lambda i: val(i, "sugar_bsilu", 0.001) - max(val(i, name, 0.001) for name in others), ".1f")
    assert f"the best of the seven, by {leads[0]} and {leads[1]} points" in page
    relu, sugar = (
        over_inits(lambda i, a=a: 100 * found[i, a, 0.3]["dead_channels"] / found[i, a, 0.3]["channels"], ".1f")
        for a in ("relu", "sugar_bsilu")
    )
    assert f"ReLU lost {relu[0]} and {relu[1]}% of its channels, SUGAR B-SiLU lost {sugar[0]} and {sugar[1]}%" in page
    names = {"sugar_nelu": "SUGAR NeLU", "leaky_relu": "LeakyReLU", "silu": "SiLU", "gelu": "GELU"}
    gains = {a: [*study.against_relu(results["fair"], a, "timm").values()] for a in ("sugar_bsilu", *names)}
    assert {len(values) for values in gains.values()} == {3}
    assert f"{study.with_interval(gains['sugar_bsilu'])} points (three seeds, test)" in page
    for activation, name in names.items():
        assert f"{name} ({study.with_interval(gains[activation], '+')})" in page

    def gain(part: str, activation: str) -> str:
        return study.with_interval([*study.against_relu(results[part], activation, "timm").values()], "+")

    assert f"SUGAR B-SiLU stays {gain('control', 'sugar_bsilu')} points above ReLU" in page
    ours, reverse = (gain("control", name) for name in ("sugar_bsilu@relu", "relu@sugar_bsilu"))
    assert f"at ReLU's size is {ours} above, ReLU's direction at SUGAR's size {reverse}: layer-wise" in page
    norms = {(r["activation"], r["seed"]): r["gradient_norms"] for r in results["control"]}
    ratios = {
        where: sorted(norms["sugar_bsilu", s][where] / norms["relu", s][where] for s in (42, 1, 10))
        for where in ("first", "last")
    }
    least, most = (f"{value:.0f}" for value in (ratios["first"][0], ratios["first"][-1]))
    assert {f"{value:.1f}" for value in ratios["last"]} == {"1.3"}
    assert f"gradient is {least} to {most} times ReLU's and the last one's 1.3 times" in page
    for part, activation, text in (
        ("dying", "sugar_bsilu", "SUGAR B-SiLU ({})"), ("dying", "elu", "ELU is {} points above"),
        ("finetune", "sugar_bsilu", "SUGAR B-SiLU ({})"), ("finetune", "sugar_nelu", "SUGAR NeLU ({})"),
    ):  # fmt: skip
        assert text.format(gain(part, activation)) in page, (part, activation)


def test_the_advice_has_the_numbers_of_the_study():
    fair = study.read_results(ROOT / "docs" / "when-it-helps" / "fair")
    rates = study.read_results(ROOT / "docs" / "when-it-helps" / "rates")
    readme, advice = (" ".join((ROOT / name).read_text().split()) for name in ("README.md", "docs/activations.md"))

    def short(values: list[float]) -> str:
        return f"{fmean(values):.1f} ± {study.interval(values):.1f}"

    tests = {a: [100 * r["test_top1"] for r in fair if r["activation"] == a] for a in ("relu", "sugar_bsilu")}
    assert f"| 3 | **{short(tests['relu'])}%** | {short(tests['sugar_bsilu'])}% |" in readme
    gains = {a: [*study.against_relu(fair, a, "timm").values()] for a in ("sugar_bsilu", "sugar_nelu", "gelu", "silu")}
    for text in (readme, advice):
        assert f"was {short(gains['sugar_bsilu']).removeprefix('-')} points below ReLU in a ResNet-18" in text
        assert f"{short(gains['sugar_nelu'])} points" in text
        for part, form in (("control", "{} points above it in one with timm's stem"), ("finetune", "{} points")):
            cells = study.read_results(ROOT / "docs" / "when-it-helps" / part)
            ahead = short([*study.against_relu(cells, "sugar_bsilu", "timm").values()])
            assert form.format(ahead) in text
    assert f"they were {short(gains['gelu'])} and {short(gains['silu'])} points above ReLU" in advice
    best = {a: {study.best_rate(rates, a, init) for init in ("timm", "pytorch")} for a in ("sugar_bsilu", "relu")}
    assert best == {"sugar_bsilu": {0.001, 0.01}, "relu": {0.03}}
    assert "it was best at 0.001 to 0.01 where ReLU was at 0.03 (1 seed)" in readme
