"""Logging to a tracker: metrics per epoch, loss and learning rate per step, all over optimizer steps."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..metrics import numbers

_WINDOW = 50  # steps between two transfers from the device


class Tracking:
    """Logs metrics and the settings to a run's tracker; without a tracker it does nothing.

    Losses stay on the device until a window of steps is full, since reading one synchronises with the device.
    """

    def __init__(self, accelerator: Accelerator, tracker: str, settings: dict[str, Any]):
        self._accelerator = accelerator
        self._enabled = tracker != "none"
        self._steps: list[tuple[int, Tensor, float]] = []
        if self._enabled:
            shown = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in settings.items()}
            accelerator.init_trackers("timm-sugar", shown)

    def step(self, step: int, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Store this process's loss, (), and the learning rate of a step; send the window when it is full."""
        if self._enabled:  # cloned, since a CUDA graph overwrites the loss
            self._steps.append((step, loss.detach().clone(), learning_rate(optimizer)))
            if len(self._steps) == _WINDOW:
                self.flush()

    def flush(self) -> None:
        """Send the stored steps, averaged over the processes; every process must call this after the same step."""
        if self._steps:
            losses: Any = self._accelerator.reduce(torch.stack([loss for _, loss, _ in self._steps]), "mean")
            for (step, _, rate), loss in zip(self._steps, losses.tolist(), strict=True):
                self._accelerator.log({"step_loss": loss, "step_lr": rate}, step=step)
            self._steps.clear()

    def epoch(self, line: dict[str, Any], step: int) -> None:
        """Send the metrics of an epoch that ended after `step` steps."""
        self.flush()
        if self._enabled:
            self._accelerator.log(numbers(line) | {"epoch": line["epoch"]}, step=step)

    def finish(self) -> None:
        """Close the tracker's files and connections."""
        for tracker in self._accelerator.trackers:
            tracker.finish()


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the highest learning rate of an optimizer's groups: with layer decay, that of the last layers."""
    return float(max(group["lr"] for group in optimizer.param_groups))
