"""Progress on standard error: a line per epoch, and a progress bar on a terminal."""

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
    """A progress bar over all steps of a run, and a line for each epoch.

    Args:
        total, done: Steps of the whole run, and steps completed before this start.
        images: Images per step, over all processes.
        enabled: Whether this process prints anything.
        warm_up: Label of the bar until the first step is done.
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
            refresh_per_second=5,  # the displayed values change at most this often
            disable=not self._enabled,
        )
        self._shown_step: HostCopy | None = None
        self._task = self._bar.add_task(warm_up, total=total, completed=done, rate="", loss="-", accuracy="-")

    def __enter__(self) -> "Progress":
        if self._enabled:  # older versions of rich print an empty line if disabled
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._enabled:
            self._bar.stop()

    def step(self, loss: Tensor, logits: Tensor, labels: Tensor, mixed: bool = False) -> None:
        """Advance by one step; the first call ends the warm-up, later calls do not synchronise with the device.

        The bar shows the mean loss, (), and, unless images are mixed, the accuracy of the logits, (N, classes).
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
        """Print a line, above the bar if there is one."""
        if self._enabled:
            self._bar.console.print(line)
        elif self._says:
            print(line, file=sys.stderr, flush=True)
