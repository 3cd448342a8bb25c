"""Overhead of the trainer over the fastest bare loop in torch, and its memory over the epochs.

    python benchmarks/trainer.py [--epochs 3] [--block 2] [--mixed-precision bf16] [--compile none compiled]

ResNet-18 (timm's stem) at 32 px on scikit-learn's digits, repeated to 56 steps an epoch, batch 128, channels last, SGD
with Nesterov's momentum, no augmentation. The trainer runs its epochs as in any run: order of the images, seeds,
schedules, loss checks, progress (a bar if standard error is a terminal). The bare loops are those of
bare_loop.py: gathering, normalisation, the network and the fused optimizer; on a GPU one CUDA graph per step. All
alternate every few steps in one process, so that other work on the machine slows all of them equally. The result is the
median, over all turns, of the ratio of speeds, with its quartiles.
"""

import argparse
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import torch
from bare_loop import BareLoop, place
from common import environment

from timm_sugar.models import build
from timm_sugar.training import TrainConfig
from timm_sugar.training.checkpoint import State
from timm_sugar.training.evaluation import evaluate_split
from timm_sugar.training.processes import StopSignal
from timm_sugar.training.progress import Progress
from timm_sugar.training.tracking import Tracking
from timm_sugar.training.train import Run, train_epoch
from timm_sugar.training.train import build as build_trainer

MODEL = "resnet18_sugar_bsilu"
BATCH = 128
REPEATS = 5  # repetitions of the 1,437 training digits
STEPS = 56  # per epoch


def build_run(output: str, epochs: int, precision: str, compiled: bool = False, **settings: float) -> Run:
    """Build the benchmark's run."""
    return build_trainer(
        TrainConfig(
            data="digits", model=MODEL, batch_size=BATCH, epochs=epochs, mixed_precision=precision, output=output,
            channels_last=True, compile=compiled, **{"val_fraction": 0.0} | settings,
        )
    )  # fmt: skip


def bare_steps(run: Run, precision: str, compile: str) -> Iterator[None]:
    """Yield after each step of a bare loop on the run's images."""
    device, pixels = run.accelerator.device, run.images.train.pixels
    assert pixels is not None
    torch.manual_seed(0)
    loop = BareLoop(
        build(MODEL, num_classes=10), place(pixels, device), run.images.train.labels, run.config.mean, run.config.std,
        epochs=run.config.epochs, batch_size=BATCH, lr=run.config.lr, momentum=run.config.momentum, compile=compile,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
    )  # fmt: skip
    for epoch in range(run.config.epochs):
        yield from loop.train_epoch(epoch)


class Turns(Progress):
    """The trainer's progress; runs a turn of each other loop after every `block` steps of the trainer.

    Attributes:
        seconds: For each round of turns, the time of the trainer and of each other loop.
    """

    def __init__(self, others: Sequence[Iterator[None]], block: int, total: int):
        super().__init__(total, 0, BATCH, enabled=True)
        self.seconds: list[list[float]] = []
        self._others, self._block, self._steps = others, block, 0

    def begin(self) -> None:
        """Start the clock of the trainer's turn."""
        self._steps, self._began = 0, _clock()

    def step(self, *arguments: Any, **options: Any) -> None:
        super().step(*arguments, **options)
        self._steps += 1
        if self._steps == self._block:
            times = [self._began, _clock()]
            for other in self._others:
                for _ in itertools.islice(other, self._block):
                    pass
                times.append(_clock())
            self.seconds.append([end - begin for begin, end in itertools.pairwise(times)])
            self.begin()


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(epochs: int, block: int, precision: str, compiled: bool, loops: Sequence[str]) -> list[list[float]]:
    """Return the seconds of all turns after the first epoch, of the trainer and of each bare loop."""
    counted: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        run = build_run(folder, epochs, precision, compiled)
        images, labels = run.images.train.pixels, run.images.train.labels
        assert images is not None
        run.images.train.pixels, run.images.train.labels = images.repeat(REPEATS, 1, 1, 1), labels.repeat(REPEATS)
        run = dataclasses.replace(run, steps_per_epoch=len(labels) * REPEATS // BATCH)
        others = [bare_steps(run, precision, compile) for compile in loops]
        with Turns(others, block, epochs * run.steps_per_epoch) as turns:
            for epoch in range(epochs):
                turns.seconds = []
                turns.begin()
                train_epoch(run, State(epoch=epoch), None, turns, Tracking(run.accelerator, "none", {}), StopSignal())
                counted += turns.seconds if epoch else []
    return counted


def memory_over_epochs(epochs: int, precision: str) -> list[float]:
    """Return the resident memory in MiB after each epoch of training and validation."""
    process, found = psutil.Process(), []
    with tempfile.TemporaryDirectory() as folder:
        run = build_run(folder, epochs, precision, val_fraction=0.2)
        with Progress(epochs * run.steps_per_epoch, 0, BATCH, enabled=True) as progress:
            for epoch in range(epochs):
                train_epoch(
                    run, State(epoch=epoch), None, progress, Tracking(run.accelerator, "none", {}), StopSignal()
                )
                evaluate_split(run.evaluated, run.images, run.accelerator, 0, None, "val")
                found.append(process.memory_info().rss / 2**20)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3, help="epochs; the first is not counted (default 3)")
    parser.add_argument("--block", type=int, default=2, help="steps per turn (default 2)")
    parser.add_argument("--mixed-precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--compile", nargs="+", default=["none", "compiled"], choices=("none", "compiled"))
    parser.add_argument(
        "--memory-epochs", type=int, default=10, help="epochs with memory measurement (default 10); 0 for none"
    )
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error("--epochs must be at least 2: the first is not counted")
    if not 1 <= options.block <= STEPS:
        parser.error(f"--block must be from 1 to {STEPS}, the steps of an epoch")
    precision, cuda = options.mixed_precision, torch.cuda.is_available()
    names = dict(none="none", compiled="compiled-graph" if cuda else "default")
    loops = [names[name] for name in options.compile] + ["graph"] * cuda

    machine = environment()
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['vector']}, {machine['threads']} threads"
    print(f"torch {torch.__version__}, {where}; {MODEL}, batch {BATCH}, {precision}, channels last")
    print("| trainer | images/s | bare loop | images/s | trainer / bare: median | quartiles | turns |")
    print("| --- | --: | --- | --: | --: | --- | --: |")
    for name in options.compile:
        turns = compare(options.epochs, options.block, precision, name == "compiled", loops)
        seconds = [statistics.median(column) for column in zip(*turns, strict=True)]
        speeds = [f"{options.block * BATCH / found:.0f}" for found in seconds]
        best = min(range(len(loops)), key=lambda i: seconds[1 + i])
        for i, loop in enumerate(loops):
            low, median, high = statistics.quantiles((turn[1 + i] / turn[0] for turn in turns), n=4)
            bare, spread = f"{loop}{', the best' * (i == best)}", f"{low:.3f} to {high:.3f}"
            row = (name, speeds[0], bare, speeds[1 + i], f"{median:.3f}", spread, len(turns))
            print(f"| {' | '.join(map(str, row))} |", flush=True)
    if options.memory_epochs > 0:
        found = memory_over_epochs(options.memory_epochs, precision)
        print("\nresident memory after each epoch, MiB: " + " ".join(f"{value:.0f}" for value in found))


if __name__ == "__main__":
    main()
