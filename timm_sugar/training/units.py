"""Dead units in training, counted during the training steps without additional passes."""

import warnings
from typing import Any

from torch import nn

from ..monitor import DeadUnitMonitor
from .processes import process_state

_MIN_COUNTED, _MAX_INTERVAL = 20, 20  # counted passes per epoch (or all, if fewer); passes between two counts


class TrainingUnits:
    """Counts over all processes which units are active in an epoch of `passes` training passes; 0 disables it."""

    def __init__(self, network: nn.Module, passes: int):
        self._monitor: DeadUnitMonitor | None = None
        self._whole = True  # whether the epoch was counted from its first step
        if not passes:
            return
        every = min(_MAX_INTERVAL, max(1, passes // _MIN_COUNTED))
        with warnings.catch_warnings():  # validation has the same limitation
            warnings.filterwarnings("ignore", message="DeadUnitMonitor cannot see")
            try:
                self._monitor = DeadUnitMonitor(network, window=None, every=every, warn_above=None)
            except ValueError:  # it finds no activation
                return

    def begin(self, passed: int, counts: dict[str, Any] | None) -> None:
        """Begin an epoch, or resume it after `passed` passes with the value that `counts` returned then."""
        self._whole = passed == 0 or counts is not None
        if self._monitor is None:
            return
        self._monitor.reset()
        if counts is not None:
            first = process_state().is_main_process  # it restores the counts of all processes
            self._monitor.restore(counts if first else counts | {"layers": {}})

    def counts(self) -> dict[str, Any] | None:
        """Return the counts of the epoch so far over all processes; a collective call."""
        return None if self._monitor is None else self._monitor.counts(all_processes=True)

    def dead(self, counts: dict[str, Any] | None) -> float | None:
        """Return the fraction of units that were never active in a whole epoch; None if `counts` does not cover it."""
        if counts is None or not self._whole:
            return None
        units = [active for layer, *_ in counts["layers"].values() for active in layer]
        return units.count(0) / len(units)

    def detach(self) -> None:
        """Remove the hooks from the network."""
        if self._monitor is not None:
            self._monitor.detach()
