"""Dead units of the training steps of a run, counted as they go, with no pass of their own."""

import warnings
from typing import Any

from torch import nn

from ..monitor import DeadUnitMonitor
from .processes import process_state

_FEW, _OFTEN = 20, 20  # passes of an epoch that are counted at least, if it has them; steps between two at most


class TrainingUnits:
    """Counts which units are active in so many training passes of an epoch, over all processes; 0 to count nothing."""

    def __init__(self, network: nn.Module, passes: int):
        self._monitor: DeadUnitMonitor | None = None
        self._whole = True  # whether the epoch was counted from its first step
        if not passes:
            return
        every = min(_OFTEN, max(1, passes // _FEW))
        with warnings.catch_warnings():  # what cannot be seen is not there in validation either
            warnings.filterwarnings("ignore", message="DeadUnitMonitor cannot see")
            try:
                self._monitor = DeadUnitMonitor(network, window=None, every=every, warn_above=None)
            except ValueError:  # no activation is seen
                return

    def begin(self, passed: int, counts: dict[str, Any] | None) -> None:
        """Begin an epoch, or go on after `passed` passes with what `counts` returned then."""
        self._whole = passed == 0 or counts is not None
        if self._monitor is None:
            return
        self._monitor.reset()
        if counts is not None:
            first = process_state().is_main_process  # it takes those of all
            self._monitor.restore(counts if first else counts | {"layers": {}})

    def counts(self) -> dict[str, Any] | None:
        """Return the counts of the epoch so far, of all processes, each of which has to call this."""
        return None if self._monitor is None else self._monitor.counts(all_processes=True)

    def dead(self, counts: dict[str, Any] | None) -> float | None:
        """Return the fraction of units that were active nowhere in the `counts` of a whole epoch."""
        if counts is None or not self._whole:
            return None
        units = [active for layer, *_ in counts["layers"].values() for active in layer]
        return units.count(0) / len(units)

    def detach(self) -> None:
        """Leave the network as it was."""
        if self._monitor is not None:
            self._monitor.detach()
