"""Progress on standard error: a line an epoch, and a bar where it is a terminal."""

import sys
import time
from typing import Any

import rich.progress as bars
import torch
from rich.console import Console
from torch import Tensor

from ..metrics import METRICS, numbers
from .device import HostCopy


class Progress:
    """A bar over all steps of a run, and a line for each epoch.

    Args:
        total, done: Steps of the whole run, and before this start.
        images: Images a step, over all processes.
        enabled: Whether this process shows anything.
        warm_up: What is shown until the first step is done.
    """

    def __init__(self, total: int, done: int, images: int, enabled: bool, warm_up: str = "training"):
        self._images = images
        self._says = enabled
        self._enabled = enabled and sys.stderr.isatty()
        self._shown = 0.0
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.TaskProgressColumn(),
            bars.TextColumn("{task.fields[rate]}"),
            bars.TextColumn("loss {task.fields[loss]}  top-1 {task.fields[accuracy]}"),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(),
            console=Console(stderr=True),
            refresh_per_second=5,  # as often as what it shows can change
            disable=not self._enabled,
        )
        self._shown_step: HostCopy | None = None
        self._task = self._bar.add_task(warm_up, total=total, completed=done, rate="", loss="-", accuracy="-")

    def __enter__(self) -> "Progress":
        if self._enabled:  # older versions of rich print an empty line where it is disabled
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._enabled:
            self._bar.stop()

    def step(self, loss: Tensor, logits: Tensor, labels: Tensor, mixed: bool = False) -> None:
        """Advance by one step; nothing waits for the device after the first, which ends the warm-up.

        Shown are the mean loss, (), and the accuracy of the logits, (N, classes), unless the images are mixtures.
        """
        if not self._enabled:
            return
        shown: dict[str, Any] = {"description": "training"}
        if (now := time.monotonic()) - self._shown > 0.2:
            self._shown = now
            speed = self._bar.tasks[self._task].speed
            shown["rate"] = f"{speed * self._images:,.0f} images/s" if speed else ""
            found = torch.stack([loss.double(), (logits.argmax(1) == labels).double().mean()])
            self._shown_step = self._shown_step or HostCopy(found)
            self._shown_step.update(found)
            loss_shown, accuracy = self._shown_step.read()
            shown["loss"] = f"{loss_shown:.3f}"
            if not mixed:
                shown["accuracy"] = f"{100 * accuracy:.0f}%"
        self._bar.update(self._task, advance=1, **shown)

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        """Print the metrics of an epoch."""
        found = numbers(line)
        parts = [f"epoch {line['epoch']}/{epochs}"]
        parts += [f"{m.label} {m.text(found[m.key])}" for m in METRICS if m.column and m.key in found]
        self.note("  ".join(parts))

    def note(self, line: str) -> None:
        """Print a line: above the bar, or by itself where there is none."""
        if self._enabled:
            self._bar.console.print(line)
        elif self._says:
            print(line, file=sys.stderr, flush=True)
