"""`DeadUnitMonitor` in transformers' Trainer."""

from typing import Any

from transformers import Trainer, TrainerCallback

from ..monitor import DeadUnitMonitor


class DeadUnitCallback(TrainerCallback):
    """Log dead units of all processes with every training loss, to the trainer's reporting integrations.

    Args:
        trainer: The trainer; the callback calls its `log`.
        **options: Options of `DeadUnitMonitor`; the window covers the steps since the last log.

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
