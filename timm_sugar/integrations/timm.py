"""`DeadUnitMonitor` in timm's train.py, and in other scripts that use timm's `create_model` and `update_summary`."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from timm import models, utils

from ..monitor import DeadUnitMonitor


@contextmanager
def monitored(**options: Any) -> Iterator[None]:
    """Monitor the first network that timm creates in this context, and log its dead units by `update_summary`.

    summary.csv and W&B get ``train_dead_units`` and so on, for the steps since the last line, of the first process.
    ``python -m timm_sugar --monitor train.py ...`` runs a script in this context. Options: as `DeadUnitMonitor`.
    """
    create: Any = models.create_model
    update: Any = utils.update_summary
    monitors, lines = list[DeadUnitMonitor](), list[int]()

    def create_model(*args: Any, **kwargs: Any) -> Any:
        model = create(*args, **kwargs)
        if not monitors:
            monitors.append(DeadUnitMonitor(model, **{"window": None, **options}))
        return model

    def update_summary(epoch: int, train_metrics: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        update(epoch, {**train_metrics, **monitors[0].summary().numbers()}, *args, **kwargs)
        monitors[0].reset()
        lines.append(epoch)

    with patch("timm.create_model", create_model), patch("timm.models.create_model", create_model):  # noqa: SIM117
        with patch("timm.utils.update_summary", update_summary):
            yield
    if not lines:
        warnings.warn("no dead units were logged: nothing called timm.utils.update_summary", stacklevel=3)
