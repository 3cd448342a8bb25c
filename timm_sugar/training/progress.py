"""Progress on standard error: a bar on a terminal, nothing otherwise."""

import sys
import time
from typing import Any

import rich.progress as bars
from rich.console import Console
from torch import Tensor

from ..metrics import METRICS, numbers


class Progress:
    """A bar over all steps of a run, and a line for each epoch.

    The bar shows loss and accuracy of the batch, images per second and the time left.

    Args:
        total: Steps of the whole run.
        done: Steps done before this start.
        images: Images a step, over all processes.
        enabled: Whether this process may show anything; it does only where standard error is a terminal.
    """

    def __init__(self, total: int, done: int, images: int, enabled: bool):
        self._images = images
        self._enabled = enabled and sys.stderr.isatty()
        self._shown = 0.0
        self._console = Console(stderr=True)
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.TaskProgressColumn(),
            bars.TextColumn("{task.fields[rate]}"),
            bars.TextColumn("loss {task.fields[loss]}  top-1 {task.fields[accuracy]}"),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=5,  # as often as what it shows can change
            disable=not self._enabled,
        )
        self._task = self._bar.add_task("training", total=total, completed=done, rate="", loss="-", accuracy="-")

    def __enter__(self) -> "Progress":
        if self._enabled:  # older versions of rich print an empty line where it is disabled
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._enabled:
            self._bar.stop()

    def step(self, loss: Tensor, logits: Tensor, labels: Tensor, mixed: bool = False) -> None:
        """Advance by one step. Nothing is read but where it is shown, a few times a second: it waits for the device.

        Args:
            loss: Mean over the step, ().
            logits: Of the step's last forward pass, (N, classes).
            labels: Likewise, int64, (N,).
            mixed: The images are mixtures of several labels, so that there is no accuracy to show.
        """
        if not self._enabled:
            return
        shown: dict[str, Any] = {}
        if (now := time.monotonic()) - self._shown > 0.2:
            self._shown = now
            speed = self._bar.tasks[self._task].speed
            shown["rate"] = f"{speed * self._images:,.0f} images/s" if speed else ""
            shown["loss"] = f"{loss.item():.3f}"
            if not mixed:
                shown["accuracy"] = f"{100 * (logits.argmax(1) == labels).double().mean().item():.0f}%"
        self._bar.update(self._task, advance=1, **shown)

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        """Print the metrics of an epoch above the bar."""
        if not self._enabled:
            return
        found = numbers(line)
        parts = [f"epoch {line['epoch']}/{epochs}"]
        parts += [f"{m.label} {m.text(found[m.key])}" for m in METRICS if m.column and m.key in found]
        self._bar.console.print("  ".join(parts))
