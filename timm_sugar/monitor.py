"""`DeadUnitMonitor`: dead units and sparsity by layer during training, for any network and training loop."""

import itertools
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakValueDictionary, finalize

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._torch import in_backward, skip_hook_guards
from .activations import (
    Activation,
    Hook,
    Watched,
    called_activations,
    calls_summary,
    kind_of,
    watch_activations,
    watchable_activations,
)

_CHECK = 100  # steps between checks for the dead-unit warning if there is no window


@dataclass(frozen=True)
class LayerActivity:
    """Statistics of one activation in training; a unit is active where its pre-activation is above 0.

    Attributes:
        name: Name of the activation in the network; ``name:2`` is its second call in a pass.
        kind: A key of `timm_sugar.activations.KINDS`, such as "sugar" or "relu".
        units: Number of units: channels of a convolution, features of a linear layer.
        dead: Units that were active nowhere.
        nearly_dead: Units that were active, but in less than the monitor's `nearly_dead` fraction of their values.
        always_active: Units that were active everywhere.
        sparsity: Fraction of the pre-activations that were not above 0.
        probability: For each unit, the fraction of its pre-activations that were above 0.
    """

    name: str
    kind: str
    units: int
    dead: int
    nearly_dead: int
    always_active: int
    sparsity: float
    probability: list[float]


@dataclass(frozen=True)
class Activity:
    """Statistics of a network's activations over a window of training steps.

    Attributes:
        steps: Training passes in the window.
        counted_steps: Passes that were counted.
        images: Length of the batch dimension, summed over the counted passes (and processes).
        dead_units, nearly_dead, always_active: Fractions of all units.
        sparsity: Fraction of all pre-activations that were not above 0.
        layers: One record for each activation, in the order of the forward pass.
        not_seen: Activations that no counted pass called.
    """

    steps: int
    counted_steps: int
    images: int
    dead_units: float
    nearly_dead: float
    always_active: float
    sparsity: float
    layers: list[LayerActivity]
    not_seen: list[str]

    def numbers(self, layers: bool = False) -> dict[str, float]:
        """Return fractions by name, for a tracker; with `layers`, also ``dead_units/NAME`` of each layer."""
        found = dict(
            dead_units=self.dead_units,
            nearly_dead_units=self.nearly_dead,
            always_active_units=self.always_active,
            activation_sparsity=self.sparsity,
        )
        if layers:
            found |= {f"dead_units/{layer.name}": layer.dead / layer.units for layer in self.layers}
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("layer", "kind", "units", "dead", "nearly dead", "always active", "sparsity")
        rows = [[*map(str, [*vars(layer).values()][:6]), f"{layer.sparsity:.1%}"] for layer in self.layers]
        left = max(len(layer.name) for layer in self.layers)
        lines = [f"{row[0]:{left}}  {row[1]:10}" + "".join(f"{cell:>15}" for cell in row[2:]) for row in (head, *rows)]
        counted = f"{self.counted_steps} of {self.steps} training passes counted, {self.images} images"
        lines.append(f"dead units {self.dead_units:.2%}, sparsity {self.sparsity:.1%}; {counted}")
        return "\n".join([*lines, *([f"not seen: {', '.join(self.not_seen)}"] if self.not_seen else [])])


class _Count(NamedTuple):
    """Counts of one activation: active values per unit, integers (units,); values per unit; batch size."""

    active: Tensor
    seen: int
    images: int


_Pass: TypeAlias = dict[str, _Count]  # by name of the activation and call number


class DeadUnitMonitor:
    """Count dead, nearly dead and always-active units of any network during training, with any training loop.

    A step is a training pass: a call of `model` in train() mode. Passes in eval() mode, and recomputation by gradient
    checkpointing, are not counted. Counts stay on the device; only `summary` synchronises with it. The monitor counts
    the activations that `timm_sugar.convert` knows, and PReLU, outside of gates; an activation that is called several
    times in a pass counts as several. Attach it before or after `torch.compile`, DDP and `convert`; detach it before
    `torch.jit.script`, and before `torch.export` in train() mode. A checkpointed network that is compiled as a whole
    needs a newer torch than 2.8, which raises an error in the backward pass.

    Args:
        model: Any network. Its state dict does not change, and copies of it (deepcopy, pickle) are not monitored.
        window: The number of latest steps that `summary` covers; None covers all steps since the start or `reset`. A
            window needs four bytes on the device for each unit and counted step.
        every: Count the first of every so many steps. 1 counts all steps, at a higher cost. With a larger value, a
            unit that is dead in the counted batches may be active in the others.
        nearly_dead: A unit that is active in less than this fraction of its values is nearly dead.
        warn_above: Warn once if more than this fraction of all units was dead in a window (in 100 steps if `window`
            is None); None never warns.

    Raises:
        ValueError: an argument is out of range, or `model` has no activation that can be monitored.

    Warns:
        UserWarning: a forward calls activation functions directly (``F.relu(x)``), which cannot be monitored; or
            activations run outside of a call of `model` and are not counted (see `step`).

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with torch.no_grad():
        ...     _ = model[0].weight.zero_(), model[0].bias.copy_(torch.tensor([1.0, 1.0, -1.0]))
        >>> monitor = DeadUnitMonitor(model, window=10, every=1)
        >>> for _ in range(20):
        ...     _ = model(torch.randn(8, 2))  # and backward, and a step of the optimizer
        >>> found = monitor.summary()
        >>> found.layers[0].dead, found.layers[0].always_active, found.steps, found.images
        (1, 2, 10, 80)
        >>> monitor.detach()
    """

    def __init__(
        self,
        model: nn.Module,
        window: int | None = 500,
        every: int = 5,
        nearly_dead: float = 0.01,
        warn_above: float | None = 0.5,
    ):
        for name, value in (("window", window), ("every", every)):
            if value is not None and (value != int(value) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
        if window is not None and window < every:
            raise ValueError(f"a window of {window} steps may hold none that is counted: every is {every}")
        for name, share in (("nearly_dead", nearly_dead), ("warn_above", warn_above)):
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {share}")
        if isinstance(model, nn.DataParallel):
            raise ValueError("what nn.DataParallel's copies compute cannot be counted: use DistributedDataParallel")
        while hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
            model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # type: ignore[assignment]
        self.model, self.window, self.every = model, window, every
        self.nearly_dead, self.warn_above = nearly_dead, warn_above
        self._places = {found.name: found for found in watchable_activations(model)}
        unseen = calls_summary(model, called_activations(model))
        if not self._places:
            why = f"out of reach are {unseen}" if unseen else "those of a scripted or exported network cannot be seen"
            raise ValueError(f"{type(model).__name__} has no activation module or attribute to monitor; {why}")
        if unseen:
            warnings.warn(f"DeadUnitMonitor cannot see {unseen}", stacklevel=2)
        # The operator declares that it writes to this tensor, so that calls keep their order.
        self._token = torch.zeros(1, device="cpu")
        _register_event()
        self._number = next(_numbers)
        others = [*_monitors.values()]
        _monitors[self._number] = self
        # By default, compiled code ignores hooks that are added or removed later.
        was_skipped = skip_hook_guards(False)
        self._skipped: bool = others[0]._skipped if others else was_skipped
        self._finalizer = finalize(self, _restore_hook_guards, self._skipped)  # runs once, on detach or collection
        self._explicit = False  # whether `step` marks the begin and end of a pass
        self._warned_outside = False
        self._pending: Callable[[], float | None] | None = None  # returns the fraction of dead units, None until ready
        self.reset()
        self._watched = watch_activations(model, self._see)
        self._watched.callback(model.register_forward_pre_hook(Hook(self._enter)).remove)
        self._watched.callback(model.register_forward_hook(Hook(self._leave)).remove)
        torch.compiler.reset()

    def reset(self) -> None:
        """Reset all counts."""
        self.steps = 0  # training passes so far
        self._passes: deque[tuple[int, _Pass]] = deque()  # with the step number
        self._counted = 0
        self._now: _Pass | None = None  # the pass being counted
        self._inside = False
        self._calls: Counter[str] = Counter()

    def counts(self, all_processes: bool = False) -> dict[str, Any]:
        """Return the counts as a JSON-serialisable dict for `restore`; synchronises with the device.

        Args:
            all_processes: As for `summary`; one process then restores them, and the others restore only `steps`.

        Raises:
            ValueError: the monitor has a window, which would need the counts of each pass.
        """
        if self.window is not None:
            raise ValueError("counts are those of a monitor with window=None")
        totals = self._totals(all_processes)
        found = {key: [count.active.tolist(), count.seen, count.images] for key, count in totals.items()}
        return {"steps": self.steps, "counted": self._counted, "layers": found}

    def restore(self, counts: dict[str, Any]) -> None:
        """Replace the counts by those that `counts` returned."""
        self.reset()
        self.steps, self._counted = counts["steps"], counts["counted"]
        layers = counts["layers"].items()
        total = {
            key: _Count(torch.tensor(active, device=_device(self.model)), *rest) for key, (active, *rest) in layers
        }
        self._passes = deque([(self.steps, total)] if total else [])

    def detach(self) -> None:
        """Remove the monitor from the network and all its hooks; `summary` still works."""
        self._watched.close()
        _monitors.pop(self._number, None)
        self._finalizer()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context that counts everything inside as one training pass, no matter how the network is called.

        Use it for ``model.forward_features(x)`` and other methods, or if one step calls the network several times.
        """
        self._explicit = True
        self._begin()
        try:
            yield
            self._end()
        finally:
            self._explicit = self._inside = False
            self._now = None

    def summary(self, all_processes: bool = False) -> Activity:
        """Return the statistics of the window; synchronises with the device.

        Args:
            all_processes: Sum the counts over the process group; all processes must call this.

        Raises:
            RuntimeError: no training pass was counted.
        """
        totals = self._totals(all_processes)
        if not totals:
            raise RuntimeError(
                f"no training pass of {type(self.model).__name__} was counted: it is to be called in train() mode"
            )
        layers = [self._layer(key, count) for key, count in totals.items()]
        units = sum(layer.units for layer in layers)
        active = sum(count.active.sum().item() for count in totals.values())
        ran = {_name(key) for key in totals}
        return Activity(
            steps=self.steps if self.window is None else min(self.steps, self.window),
            counted_steps=self._counted if self.window is None else len(self._passes),
            images=next(iter(totals.values())).images,
            dead_units=sum(layer.dead for layer in layers) / units,
            nearly_dead=sum(layer.nearly_dead for layer in layers) / units,
            always_active=sum(layer.always_active for layer in layers) / units,
            sparsity=1 - active / sum(count.seen * len(count.active) for count in totals.values()),
            layers=layers,
            not_seen=[name for name in self._places if name not in ran],
        )

    def _layer(self, key: str, count: _Count) -> LayerActivity:
        place = self._places[_name(key)]
        active = count.active.cpu()
        probability = active.double() / count.seen
        dead = active == 0
        return LayerActivity(
            name=key,
            kind=kind_of(getattr(place.parent, place.key)) or place.kind or "",  # may have been converted
            units=len(active),
            dead=int(dead.sum()),
            nearly_dead=int(((probability < self.nearly_dead) & ~dead).sum()),
            always_active=int((active == count.seen).sum()),
            sparsity=1 - probability.mean().item(),
            probability=[float(f"{share:.4g}") for share in probability.tolist()],
        )

    def _totals(self, all_processes: bool = False) -> _Pass:
        """Sum the passes, optionally over all processes; skip activations without values."""
        by_key: dict[str, list[_Count]] = {}
        for _, counts in self._passes:
            for key, count in counts.items():
                by_key.setdefault(key, []).append(count)
        totals = {key: _add(key, counts) for key, counts in by_key.items()}
        totals = {key: count for key, count in totals.items() if count.seen}
        if all_processes and dist.is_initialized() and dist.get_world_size() > 1:
            return _add_up_processes(totals, _device(self.model))
        return totals

    # In a compiled network the hooks insert calls of `_event`, an operator that is opaque to the compiler, because the
    # work depends on the step and on whether the backward pass is recomputing activations.

    def _enter(self, module: nn.Module, *_: Any) -> None:
        if module is not self.model or self._explicit:
            return
        if torch.compiler.is_compiling():
            if module.training:
                _event(None, self._token, self._number, "", True)
        else:
            self._begin()

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if module is not self.model or self._explicit:
            return
        if torch.compiler.is_compiling():
            if module.training:
                _event(None, self._token, self._number, "", False)
        else:
            self._end()

    def _see(self, name: str, x: Tensor, channels_last: bool) -> None:
        if not torch.compiler.is_compiling():
            self._count(name, x, channels_last)
        elif self.model.training:
            _event(x.detach(), self._token, self._number, name, channels_last)

    def _begin(self) -> None:
        self._inside, self._now = True, None
        if not self.model.training or torch.jit.is_tracing():
            return
        if self.warn_above is not None and self._passes and self.steps % self._span == 0:
            dead_units = [count.active == 0 for count in self._totals().values()]
            self._pending = _async_value(torch.cat(dead_units).double().mean()) if dead_units else None
        if self._pending is not None and (dead := self._pending()) is not None:
            self._pending = None
            if self.warn_above is not None and dead > self.warn_above:
                self.warn_above = None  # once
                warnings.warn(
                    f"{dead:.0%} of the units of {type(self.model).__name__} were dead in {self._span} training steps; "
                    "DeadUnitMonitor.summary() says where",
                    stacklevel=2,
                )
        if self.steps % self.every == 0:
            for name, place in self._places.items():
                if not _is_watched(place):
                    raise RuntimeError(f"{name} was replaced after DeadUnitMonitor was attached: attach it again")
            self._now = {}
            self._calls.clear()
        self.steps += 1

    def _count(self, name: str, x: Tensor, channels_last: bool) -> None:
        if in_backward() or not isinstance(x, Tensor):  # a Proxy of torch.fx
            return
        if not self._inside:
            if self.model.training and not self._warned_outside:
                self._warned_outside = True
                warnings.warn(
                    f"{name} runs outside of a call of {type(self.model).__name__}, which DeadUnitMonitor does not "
                    "count: put `with monitor.step():` around what is a step",
                    stacklevel=2,
                )
            return
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("DeadUnitMonitor cannot count inside of a CUDA graph: detach it, or compile without")
        if self._now is None:
            return
        self._calls[name] += 1
        key = name if self._calls[name] == 1 else f"{name}:{self._calls[name]}"
        active = _active(x.detach(), channels_last)
        self._now[key] = _Count(active, x.numel() // max(len(active), 1), len(x))

    def _end(self) -> None:
        now, self._now, self._inside = self._now, None, False
        if now is not None:
            if not now:
                raise RuntimeError(
                    f"no activation of {type(self.model).__name__} ran where DeadUnitMonitor sees it: is it exported, "
                    "or compiled in a way that leaves out hooks?"
                )
            self._counted += 1
            self._passes.append((self.steps, now))
            if self.window is None and len(self._passes) > 1:
                self._passes = deque([(self.steps, self._totals())])
        while self.window is not None and self._passes and self._passes[0][0] <= self.steps - self.window:
            self._passes.popleft()

    @property
    def _span(self) -> int:
        return self.window or _CHECK


_monitors: WeakValueDictionary[int, DeadUnitMonitor] = WeakValueDictionary()
_numbers = itertools.count()


def _restore_hook_guards(skipped: bool) -> None:
    if not [*_monitors.values()]:  # len() would count monitors that are being collected
        skip_hook_guards(skipped)


_event: Any = None  # custom operator that compiled code calls


def _register_event() -> None:
    """Register the operator once; not on import, since it would take a third of the import time."""
    global _event
    if _event is None:
        _event = torch.library.custom_op("timm_sugar::monitor", _take_event, mutates_args={"token"})


def _take_event(x: Tensor | None, token: Tensor, monitor: int, name: str, flag: bool) -> None:
    found = _monitors.get(monitor)
    if found is None:  # detached
        return
    if x is not None:
        found._count(name, x, flag)
    elif flag:
        found._begin()
    else:
        found._end()


def _active(x: Tensor, channels_last: bool) -> Tensor:
    """Return the number of values above 0 for each unit, int32 (units,)."""
    # A uint8 sum holds up to 255 images, and takes a tenth of the time of an integer sum.
    active = sum(part.sum(0, dtype=torch.uint8).int() for part in (x > 0).view(torch.uint8).split(255))
    assert isinstance(active, Tensor)
    if channels_last:
        return active.reshape(-1, active.shape[-1]).sum(0, dtype=torch.int32)
    return active.reshape(len(active), -1).sum(1, dtype=torch.int32)


def _add(key: str, counts: list[_Count]) -> _Count:
    if len({len(count.active) for count in counts}) > 1:
        raise RuntimeError(f"{key} had different numbers of units in the passes counted: they cannot be added up")
    active = torch.stack([count.active for count in counts]).sum(0)  # int64
    return _Count(active, sum(count.seen for count in counts), sum(count.images for count in counts))


def _add_up_processes(mine: _Pass, device: torch.device) -> _Pass:
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, [(key, len(c.active), c.seen, c.images) for key, c in mine.items()])
    total: dict[str, _Count] = {}
    for key, units, seen, images in (layer for part in of_all for layer in part):
        none = _Count(torch.zeros(units, dtype=torch.int64, device=device), 0, 0)
        so_far = total.get(key, none)
        active = mine[key].active.to(device, torch.int64) if key in mine else none.active
        if len(so_far.active) != units:
            raise RuntimeError(f"{key} has {units} units in one process and {len(so_far.active)} in another")
        total[key] = _Count(active, so_far.seen + seen, so_far.images + images)
    for count in total.values():
        dist.all_reduce(count.active)
    return total


def _is_watched(place: Activation) -> bool:
    value = getattr(place.parent, place.key, None)
    hooks = value._forward_pre_hooks.values() if isinstance(value, nn.Module) else ()
    return isinstance(value, Watched) or any(isinstance(hook, Hook) for hook in hooks)


def _name(key: str) -> str:
    return key.partition(":")[0]


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _async_value(value: Tensor) -> Callable[[], float | None]:
    """Copy a value to the CPU without waiting; return a function that gives the number, or None until it is ready."""
    if not value.is_cuda:
        number = value.item()
        return lambda: number
    copied, done = value.to("cpu", non_blocking=True), torch.cuda.Event()
    done.record()
    return lambda: copied.item() if done.query() else None
