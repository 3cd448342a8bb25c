"""`DeadUnitMonitor` in transformers' Trainer."""

from typing import Any

from transformers import Trainer, TrainerCallback

from ..monitor import DeadUnitMonitor


class DeadUnitCallback(TrainerCallback):
    """Log dead units with every training loss, to whatever the trainer reports to; over all processes.

    Args:
        trainer: Whose `log` it calls.
        **options: As `DeadUnitMonitor` takes them; the window is what was trained since the last log.

    Example:
        >>> trainer.add_callback(DeadUnitCallback(trainer))  # before trainer.train()
    """

    def __init__(self, trainer: Trainer, **options: Any):
        self.trainer, self.options = trainer, {"window": None, **options}
        self.monitor: DeadUnitMonitor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.monitor = DeadUnitMonitor(kwargs["model"], **self.options)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.monitor is not None and "loss" in kwargs["logs"]:
            self.trainer.log(self.monitor.summary(all_processes=True).numbers())
            if self.monitor.window is None:
                self.monitor.reset()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.monitor is not None:
            self.monitor.detach()
