"""`DeadUnitMonitor` in Lightning, for both package names."""

from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..monitor import DeadUnitMonitor

Callback: Any = import_module("lightning.pytorch" if find_spec("lightning") else "pytorch_lightning").Callback


class DeadUnitCallback(Callback):  # type: ignore[misc]
    """Log dead units of all processes to the trainer's loggers, every `log_every_n_steps`.

    Options are those of `DeadUnitMonitor`. A training batch is one step, no matter how often it calls the network.
    >>> trainer = lightning.Trainer(callbacks=[DeadUnitCallback()])
    """

    def __init__(self, **options: Any):
        self.options, self.logged = options, 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.monitor = DeadUnitMonitor(pl_module, **self.options)

    def on_train_batch_start(self, *_: Any) -> None:
        self.batch = ExitStack()
        self.batch.enter_context(self.monitor.step())

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.batch.close()
        step = trainer.global_step
        if step != self.logged and step % (trainer.log_every_n_steps or step + 1) == 0:
            self.logged, numbers = step, self.monitor.summary(all_processes=True).numbers()
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=step)

    def on_train_end(self, *_: Any) -> None:
        self.monitor.detach()
