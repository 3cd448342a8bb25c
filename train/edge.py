"""A segmenter for the edge: SiLU, ReLU and SUGAR in a CSPDarknet, in float and in int8.

    python train/edge.py --output output/edge

The backbone of the smaller YOLOs, built with timm's `features_only` and a feature pyramid on top, learns to segment
shapes that the script draws. Each activation is trained from random weights and from the weights of the trained SiLU
network, with the same seeds. Every network is then exported to ONNX and quantised with onnxruntime's static
quantisation, and each file is measured. Writes edge.json; finished networks are skipped.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

try:
    import onnx
    import onnxruntime
    import onnxscript as onnxscript  # needed by torch.onnx
    import scipy as scipy  # needed by the intervals
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from torchvision.ops import FeaturePyramidNetwork

    from timm_sugar.training.command import one_line_errors
except ModuleNotFoundError as error:
    packages = "'timm-sugar[train,report]' torchvision onnx onnxscript onnxruntime"
    sys.exit(f"edge.py: {error.name} is missing: pip install {packages}")

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper.table import with_interval
from timm_sugar import convert, to_relu
from timm_sugar.files import write_file
from timm_sugar.terminal import Parser

CLASSES = ("background", "disc", "square", "triangle")
ACTIVATIONS = ("silu", "relu", "sugar_bsilu", "sugar_nelu")
BATCH = 16
CALIBRATION = 64  # images for measuring the int8 ranges


def draw_shapes(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw images of up to four shapes that may overlap, on gratings, with noise.

    Args:
        count: Number of images.
        size: Side of an image in pixels.
        seed: Seed of all random choices.

    Returns:
        Images, float32 (count, 3, size, size) around 0, and the class of each pixel, int64 (count, size, size).
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    images = np.empty((count, 3, size, size), np.float32)
    masks = np.zeros((count, size, size), np.int64)
    for image, mask in zip(images, masks, strict=True):
        angle, frequency = rng.uniform(0, 2 * np.pi), rng.uniform(10, 40)
        grating = np.sin(frequency * (x * np.cos(angle) + y * np.sin(angle)))
        image[:] = rng.uniform(-0.5, 0.5, (3, 1, 1)) + rng.uniform(0.1, 0.4, (3, 1, 1)) * grating
        for kind in rng.integers(1, len(CLASSES), rng.integers(1, 5)):
            (cx, cy), radius, turn = rng.uniform(0.1, 0.9, 2), rng.uniform(0.1, 0.22), rng.uniform(0, 2 * np.pi)
            u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
            v = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
            if kind == 1:
                inside = u**2 + v**2 < radius**2
            elif kind == 2:
                inside = np.maximum(abs(u), abs(v)) < 0.85 * radius
            else:
                inside = (v > -0.6 * radius) & (v + 1.732 * abs(u) < 1.1 * radius)
            image[:, inside] = rng.uniform(-1, 1, (3, 1))
            mask[inside] = kind
        image += rng.normal(0, 0.25, image.shape)
    return torch.from_numpy(images), torch.from_numpy(masks)


class Segmenter(nn.Module):
    """A `features_only` backbone of timm and a feature pyramid: (B, 3, H, W) to logits (B, classes, H, W)."""

    def __init__(self, backbone: str, width: int = 48):
        super().__init__()
        self.backbone = timm.create_model(backbone, features_only=True, out_indices=(1, 2, 3))
        channels = self.backbone.feature_info.channels()  # at strides 4, 8 and 16
        self.neck = FeaturePyramidNetwork(channels, width)
        self.head = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.SiLU(),
            nn.Conv2d(width, len(CLASSES), 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        levels = self.neck({str(level): features for level, features in enumerate(self.backbone(x))})
        return F.interpolate(self.head(levels["0"]), scale_factor=4.0, mode="bilinear")


def with_activation(network: nn.Module, activation: str) -> tuple[nn.Module, int]:
    """Replace every SiLU of a network by an activation; return the network and the number of SiLUs replaced."""
    if activation == "silu":
        return network, 0
    convert(network, "bsilu" if activation == "relu" else activation.removeprefix("sugar_"), replace="silu")
    reached = len(network.sugar_report.converted)
    return (to_relu(network) if activation == "relu" else network), reached


def fit(network: nn.Module, images: Tensor, masks: Tensor, steps: int, lr: float, seed: int) -> float:
    """Train with AdamW and a cosine schedule; return the mean loss of the last tenth of the steps."""
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    losses = []
    network.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (BATCH,), generator=order)
        loss = F.cross_entropy(network(images[batch]), masks[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def batches(images: Tensor, size: int = BATCH) -> Iterator[Tensor]:
    """Yield full batches of images; exported networks have a fixed batch size."""
    yield from images[: len(images) // size * size].split(size)


def mean_iou(predicted: Tensor, masks: Tensor) -> float:
    """Mean intersection over union of the classes; `predicted` and `masks` are int64 of the same shape."""
    pairs = torch.bincount(masks.flatten() * len(CLASSES) + predicted.flatten(), minlength=len(CLASSES) ** 2)
    table = pairs.view(len(CLASSES), -1).double()
    both = table.diag()
    return (both / (table.sum(0) + table.sum(1) - both)).mean().item()


class Calibration(CalibrationDataReader):
    """Images on which onnxruntime measures the ranges of activations."""

    def __init__(self, images: Tensor):
        self.left = batches(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.left, None)
        return None if batch is None else {"images": batch.numpy()}


def export(network: nn.Module, images: Tensor, path: Path) -> tuple[Path, Path]:
    """Write a network as ONNX, with a fixed batch size, and in int8, with ranges measured on images.

    Args:
        network: A SUGAR network is exported as a plain ReLU network.
        images: float32 (N, 3, H, W), at least one batch, for the ranges.
        path: NAME.onnx; the int8 file is NAME.int8.onnx. Weights are int8 by channel, activations uint8 by tensor.

    Returns:
        Paths of the two files.
    """
    example = next(batches(images))
    program = torch.onnx.export(network.eval(), (example,), input_names=["images"], dynamo=True, verbose=False)
    program.save(path)
    prepared, int8 = path.with_suffix(".prepared.onnx"), path.with_suffix(".int8.onnx")
    quant_pre_process(path, prepared)
    quantize_static(
        prepared, int8, Calibration(images), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    prepared.unlink()
    return path, int8


def run_onnx(path: Path, images: Tensor) -> Tensor:
    """Logits of an ONNX file for images, in batches on one CPU core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.cat([torch.from_numpy(session.run(None, {"images": b.numpy()})[0]) for b in batches(images)])


def operators(path: Path) -> dict[str, int]:
    """How often each operator occurs in an ONNX file."""
    return dict(Counter(node.op_type for node in onnx.load(path).graph.node))


def run_torch(network: nn.Module, images: Tensor) -> Tensor:
    """Logits of a network in eval mode for images."""
    with torch.no_grad():
        return torch.cat([network.eval()(batch) for batch in batches(images)])


def measure(network: nn.Module, path: Path, data: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Export a trained network, and evaluate it with torch, the float file and the int8 file on the test images."""
    images, masks = data["test"]
    logits = run_torch(network, images)
    masks = masks[: len(logits)]
    found: dict[str, Any] = {"torch_iou": mean_iou(logits.argmax(1), masks)}
    files = export(network, data["train"][0][:CALIBRATION], path)
    for kind, path in zip(("float", "int8"), files, strict=True):
        shown = run_onnx(path, images)
        found[f"{kind}_iou"] = mean_iou(shown.argmax(1), masks)
        found[f"{kind}_bytes"] = path.stat().st_size
        found[f"{kind}_operators"] = operators(path)
        found[f"{kind}_difference"] = (shown - logits).abs().max().item()
    return found


def study(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train and measure every network that is not in edge.json yet."""
    file = args.output / "edge.json"
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "seeds")}
    cells = []
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before["settings"] != settings:
            raise ValueError(f"{file} was measured with other settings, {before['settings']}; give another --output")
        cells = before["cells"]
    args.output.mkdir(parents=True, exist_ok=True)
    data = {part: draw_shapes(n, args.size, s) for part, n, s in (("train", args.images, 1), ("test", args.test, 2))}
    for seed in args.seeds:
        for start in ("random", "silu"):
            for activation in ACTIVATIONS:
                name = f"{start}-{activation}-{seed}"
                weights = args.output / f"random-silu-{seed}.pt"
                if any(cell["name"] == name for cell in cells):
                    continue
                torch.manual_seed(seed)
                network: nn.Module = Segmenter(args.backbone)
                if start == "silu":
                    network.load_state_dict(torch.load(weights, weights_only=True))
                network, reached = with_activation(network, activation)
                cell = {"name": name, "start": start, "activation": activation, "seed": seed, "converted": reached}
                if start == "silu":
                    logits = run_torch(network, data["test"][0])
                    cell["swapped_iou"] = mean_iou(logits.argmax(1), data["test"][1][: len(logits)])
                steps, lr = (args.steps, args.lr) if start == "random" else (args.more_steps, args.lr / 2)
                cell["train_loss"] = fit(network, *data["train"], steps, lr, seed)
                if name == f"random-silu-{seed}":
                    torch.save(network.state_dict(), weights)
                cells.append(cell | measure(network, args.output / f"{name}.onnx", data))
                versions = {
                    "torch": torch.__version__,
                    "timm": timm.__version__,
                    "onnxruntime": onnxruntime.__version__,
                }
                report = {"settings": settings, "versions": versions, "cells": cells}
                write_file(file, json.dumps(report, indent=1) + "\n")
                last = cells[-1]
                print(
                    f"{name}: {reached} SiLUs swapped, IoU {100 * last['float_iou']:.1f}%, "
                    f"int8 {100 * last['int8_iou']:.1f}%",
                    file=sys.stderr,
                )
    return cells


def tables(cells: Sequence[dict[str, Any]]) -> str:
    """Return the results in Markdown: means over the seeds, with 95% t-intervals; differences are paired by seed."""
    lines = []
    for start, heading in (("random", "From random weights"), ("silu", "From the trained SiLU network")):
        swapped = " at once |" if start == "silu" else ""
        head = f"| activation |{swapped} float | against relu | int8 | lost in int8 "
        head += "| MiB | operators, int8 |"
        lines += [
            f"{heading}, mean IoU (%) of the test images:",
            "",
            head,
            "| --- |" + " --: |" * (head.count("|") - 2),
        ]
        for activation in ACTIVATIONS:
            own = [cell for cell in cells if (cell["start"], cell["activation"]) == (start, activation)]
            if not own:
                continue
            row = [with_interval([100 * cell["swapped_iou"] for cell in own], digits=1)] if start == "silu" else []
            relu = {c["seed"]: c for c in cells if (c["start"], c["activation"]) == (start, "relu")}
            gains = [100 * (c["float_iou"] - relu[c["seed"]]["float_iou"]) for c in own if c["seed"] in relu]
            row.append(with_interval([100 * cell["float_iou"] for cell in own], digits=1))
            row.append(with_interval(gains, "+", 1) if gains and activation != "relu" else "")
            row.append(with_interval([100 * cell["int8_iou"] for cell in own], digits=1))
            row.append(with_interval([100 * (cell["float_iou"] - cell["int8_iou"]) for cell in own], digits=1))
            row.append(" / ".join(f"{own[0][f'{kind}_bytes'] / 2**20:.1f}" for kind in ("float", "int8")))
            row.append(str(sum(own[0]["int8_operators"].values())))
            lines.append(f"| {activation} | {' | '.join(row)} |")
        lines.append("")
    seeds = ", ".join(map(str, dict.fromkeys(cell["seed"] for cell in cells)))
    reached = max(cell["converted"] for cell in cells)
    return "\n".join([*lines, f"Seeds {seeds}; `convert` reached {reached} SiLUs."]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="edge.py")
    parser.add_argument("--output", type=Path, default=Path("output/edge"), metavar="DIR", help="default output/edge")
    parser.add_argument(
        "--backbone", default="cs3darknet_focus_s", help="a timm model with SiLU (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default 0 1 2")
    parser.add_argument("--size", type=int, default=48, help="side of the images, a multiple of 16 (default 48)")
    parser.add_argument("--images", type=int, default=2048, help="for training (default 2048)")
    parser.add_argument("--test", type=int, default=512, help="for the test (default 512)")
    parser.add_argument("--steps", type=int, default=300, help="from random weights, batches of 16 (default 300)")
    parser.add_argument("--more-steps", type=int, default=150, help="from the trained SiLU network (default 150)")
    parser.add_argument(
        "--lr", type=float, default=0.002, help="of AdamW, half of it from trained weights (default 0.002)"
    )
    args = parser.parse_args(argv)
    if min(args.images, args.test) < BATCH:
        parser.error(f"--images and --test must be at least {BATCH}, a batch, got {args.images} and {args.test}")
    if args.size % 16 or args.size < 32 or min(args.steps, args.more_steps) < 1:
        parser.error("--size must be a multiple of 16 from 32 on, and --steps and --more-steps at least 1")
    with one_line_errors(parser.prog):
        print(tables(study(args)))


if __name__ == "__main__":
    main()
