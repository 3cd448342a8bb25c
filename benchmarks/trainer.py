"""What the trainer costs over a bare loop: the same steps side by side, and memory over epochs.

    python benchmarks/trainer.py [--epochs 3] [--block 2] [--mixed-precision bf16]

ResNet-18 (timm's stem) at 32 px on scikit-learn's digits, repeated to 56 steps an epoch, batch 128, no augmentation.
The trainer runs its epochs as in any run: order of the images, uint8 pixels gathered and normalised, seeds, schedules,
watch over the loss, progress (a bar where standard error is a terminal). The bare loop steps through float32 tensors
that are in memory, normalised and in order, under the same autocast and optimizer. The two take turns of a few steps in
one process, so that whatever else the machine does slows both: reported is the median, over all turns, of the ratio of
their speeds, with its quartiles.
"""

import argparse
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_sugar.data import normalize
from timm_sugar.models import build
from timm_sugar.training import TrainConfig
from timm_sugar.training.checkpoint import State
from timm_sugar.training.evaluation import evaluate_split
from timm_sugar.training.processes import StopSignal
from timm_sugar.training.progress import Progress
from timm_sugar.training.train import Run, train_epoch
from timm_sugar.training.train import build as build_trainer

MODEL = "resnet18_sugar_bsilu"
BATCH = 128
REPEATS = 5  # of the 1,437 digits that are trained on
STEPS = 56  # an epoch


def build_run(output: str, epochs: int, precision: str, **settings: float) -> Run:
    """Build the benchmark's run."""
    return build_trainer(
        TrainConfig(
            data="digits", model=MODEL, batch_size=BATCH, epochs=epochs, mixed_precision=precision, output=output,
            **{"val_fraction": 0.0} | settings,
        )
    )  # fmt: skip


def bare_steps(images: Tensor, labels: Tensor, precision: str) -> Iterator[None]:
    """Yield after each step of the shortest loop that trains the same network."""
    torch.manual_seed(0)
    model = build(MODEL, num_classes=10).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, nesterov=True)
    for step in itertools.cycle(range(len(labels) // BATCH)):
        batch = slice(step * BATCH, (step + 1) * BATCH)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(model(images[batch]).float(), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


class Turns(Progress):
    """The trainer's progress, which lets another loop have a turn after every `block` steps of the trainer.

    Attributes:
        seconds: Of each pair of turns, those of the trainer and those of the other loop.
    """

    def __init__(self, other: Iterator[None], block: int, total: int):
        super().__init__(total, 0, BATCH, enabled=True)
        self.seconds: list[tuple[float, float]] = []
        self._other, self._block, self._steps = other, block, 0

    def begin(self) -> None:
        """Start the clock of the trainer's turn."""
        self._steps, self._began = 0, time.perf_counter()

    def step(self, *arguments: Any, **options: Any) -> None:
        super().step(*arguments, **options)
        self._steps += 1
        if self._steps == self._block:
            between = time.perf_counter()
            for _ in itertools.islice(self._other, self._block):
                pass
            self.seconds.append((between - self._began, time.perf_counter() - between))
            self.begin()


def compare(epochs: int, block: int, precision: str) -> list[tuple[float, float]]:
    """Print a row for each epoch, and return the seconds of all turns but those of the first."""
    with tempfile.TemporaryDirectory() as folder:
        run = build_run(folder, epochs, precision)
        images, labels = run.images.train.pixels, run.images.train.labels
        images, labels = images.repeat(REPEATS, 1, 1, 1), labels.repeat(REPEATS)
        run.images.train.pixels, run.images.train.labels = images, labels
        run = dataclasses.replace(run, steps_per_epoch=len(labels) // BATCH)
        bare = bare_steps(normalize(images, run.config.mean, run.config.std), labels, precision)
        counted = []
        with Turns(bare, block, epochs * run.steps_per_epoch) as turns:
            for epoch in range(epochs):
                turns.seconds = []
                turns.begin()
                train_epoch(run, State(epoch=epoch), None, turns, StopSignal())
                speeds = [block * BATCH / statistics.median(seconds) for seconds in zip(*turns.seconds, strict=True)]
                ratio = statistics.median(other / ours for ours, other in turns.seconds)
                name = f"{epoch + 1}{'' if epoch else ' (warm-up)'}"
                print(f"| {name} | {speeds[1]:.0f} | {speeds[0]:.0f} | {ratio:.3f} |", flush=True)
                counted += turns.seconds if epoch else []
    return counted


def memory_over_epochs(epochs: int, precision: str) -> list[float]:
    """Return the resident memory in MiB after each epoch of training and validation."""
    process, found = psutil.Process(), []
    with tempfile.TemporaryDirectory() as folder:
        run = build_run(folder, epochs, precision, val_fraction=0.2)
        with Progress(epochs * run.steps_per_epoch, 0, BATCH, enabled=True) as progress:
            for epoch in range(epochs):
                train_epoch(run, State(epoch=epoch), None, progress, StopSignal())
                evaluate_split(run.evaluated, run.images, run.accelerator, 0, None, "val")
                found.append(process.memory_info().rss / 2**20)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3, help="epochs of both; the first is not counted (default 3)")
    parser.add_argument("--block", type=int, default=2, help="steps of a turn (default 2)")
    parser.add_argument("--mixed-precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--memory-epochs", type=int, default=10, help="epochs that memory is watched (default 10)")
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error("--epochs must be at least 2: the first is not counted")
    if not 1 <= options.block <= STEPS:
        parser.error(f"--block must be from 1 to {STEPS}, the steps of an epoch")
    if options.memory_epochs < 1:
        parser.error("--memory-epochs must be at least 1")
    precision = options.mixed_precision

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {MODEL}, batch {BATCH}, {precision}")
    print("| epoch | bare loop, images/s | trainer, images/s | trainer / bare |\n| --- | --- | --- | --- |")
    turns = compare(options.epochs, options.block, precision)
    low, median, high = statistics.quantiles((bare / ours for ours, bare in turns), n=4)
    print(f"\ntrainer / bare: median {median:.3f}, quartiles {low:.3f} to {high:.3f}, of {len(turns)} turns")
    found = memory_over_epochs(options.memory_epochs, precision)
    print("resident memory after each epoch, MiB: " + " ".join(f"{value:.0f}" for value in found))


if __name__ == "__main__":
    main()
