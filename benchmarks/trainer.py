"""What the trainer costs over a bare loop: the same steps side by side, and memory over epochs.

    python benchmarks/trainer.py [--epochs 6] [--block 7] [--mixed-precision bf16]

ResNet-18 (timm's stem) at 32 px on scikit-learn's digits, repeated to 56 steps an epoch, batch 128, no augmentation.
The bare loop steps through float32 tensors that are in memory and normalised already, under the same autocast and
optimizer. The two take turns of a few steps in one process, so that whatever else the machine does slows both: what is
reported is the median, over all turns, of the ratio of their speeds, with its quartiles.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_sugar.data import normalize
from timm_sugar.models import build
from timm_sugar.training import TrainConfig
from timm_sugar.training.build import Run, prepare
from timm_sugar.training.loop import State, train_steps
from timm_sugar.training.results import measure

MODEL = "resnet18_sugar_bsilu"
BATCH = 128
REPEATS = 5


def config(output: Path, epochs: int, precision: str, **settings: float) -> TrainConfig:
    """Return the settings of the benchmark's run."""
    return TrainConfig(
        data="digits", model=MODEL, batch_size=BATCH, epochs=epochs, mixed_precision=precision, output=str(output),
        **{"val_fraction": 0.0} | settings,
    )  # fmt: skip


def repeated(run: Run, times: int) -> Run:
    """Give a run its training images several times over."""
    run.train.pixels, run.train.labels = run.train.pixels.repeat(times, 1, 1, 1), run.train.labels.repeat(times)
    run.sizes["train"] *= times
    return run


def trainer_steps(run: Run) -> Iterator[object]:
    """Yield after each step of the trainer, epoch after epoch."""
    for epoch in itertools.count():
        yield from train_steps(run, State(epoch=epoch))


def bare_steps(images: Tensor, labels: Tensor, precision: str) -> Iterator[object]:
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


def turns(contestants: dict[str, Iterator[object]], steps: int, count: int) -> Iterator[dict[str, float]]:
    """Let the contestants take turns of so many steps, who begins changing each time; yield their images a second."""
    names = list(contestants)
    for _ in range(count):
        rates = {}
        for name in names:
            began = time.perf_counter()
            for _ in itertools.islice(contestants[name], steps):
                pass
            rates[name] = steps * BATCH / (time.perf_counter() - began)
        yield rates
        names.reverse()


def memory_over_epochs(epochs: int, precision: str) -> list[float]:
    """Return the resident memory in MiB after each epoch of training and validation."""
    process, found = psutil.Process(), []
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(config(Path(folder), epochs, precision, val_fraction=0.2))
        for epoch in range(epochs):
            for _ in train_steps(run, State(epoch=epoch)):
                pass
            measure(run, run.val, "val")
            found.append(process.memory_info().rss / 2**20)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6, help="epochs of both; the first is not counted (default 6)")
    parser.add_argument("--block", type=int, default=7, help="steps of a turn (default 7)")
    parser.add_argument("--mixed-precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--memory-epochs", type=int, default=10, help="epochs over which memory is watched")
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error("--epochs must be at least 2: the first is not counted")
    precision = options.mixed_precision

    with tempfile.TemporaryDirectory() as folder:
        run = repeated(prepare(config(Path(folder), options.epochs, precision)), REPEATS)
    images, labels = normalize(run.train.pixels, run.config.mean, run.config.std), run.train.labels
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {MODEL}, batch {BATCH}, {precision}")
    print("| epoch | bare loop, images/s | trainer, images/s | trainer / bare |\n| --- | --- | --- | --- |")
    contestants = {"bare": bare_steps(images, labels, precision), "trainer": trainer_steps(run)}
    ratios = []
    for epoch in range(1, options.epochs + 1):
        rates = list(turns(contestants, options.block, run.steps_per_epoch // options.block))
        of_epoch = [rate["trainer"] / rate["bare"] for rate in rates]
        ratios += of_epoch if epoch > 1 else []
        medians = [statistics.median(rate[name] for rate in rates) for name in contestants]
        shown = f"| {medians[0]:.0f} | {medians[1]:.0f} | {statistics.median(of_epoch):.3f} |"
        print(f"| {epoch}{' (warm-up)' if epoch == 1 else ''} {shown}", flush=True)
    low, median, high = statistics.quantiles(ratios, n=4)
    print(f"\ntrainer / bare: median {median:.3f}, quartiles {low:.3f} to {high:.3f}, of {len(ratios)} turns")
    found = memory_over_epochs(options.memory_epochs, precision)
    print("resident memory after each epoch, MiB: " + " ".join(f"{value:.0f}" for value in found))


if __name__ == "__main__":
    main()
