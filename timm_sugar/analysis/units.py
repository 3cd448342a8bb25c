"""Count the active units of a network at its activations during an evaluation pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import watch_activations, watchable_activations


@dataclass
class LayerCounts:
    """How often each element of one activation's input was above 0.

    A unit is a channel of a convolution or a feature of a linear layer; an element is a unit at one position.

    Attributes:
        kind: Kind of the activation, a key of `timm_sugar.activations.KINDS`.
        channels_last: Whether units are the last dimension instead of the first.
        active: int64 counts of active images, shape of the input without the batch dimension.
        images: Length of the batch dimension, summed over the passes.
        seen: Number of pre-activations, summed over the passes.
    """

    kind: str
    channels_last: bool
    active: Tensor
    images: int = 0
    seen: int = 0

    def add(self, active: Tensor, images: int, seen: int) -> None:
        """Add the counts of a pass, whose input may have another number of positions.

        Raises:
            ValueError: it has another number of dimensions.
        """
        if active.ndim != self.active.ndim:
            raise ValueError(
                f"inputs of an activation had {self.active.ndim} and {active.ndim} dimensions besides the batch; "
                "count single images and batches apart"
            )
        if active.shape != self.active.shape:
            shape = tuple(map(max, active.shape, self.active.shape))
            self.active, active = _pad(self.active, shape), _pad(active, shape)
        self.active += active
        self.images += images
        self.seen += seen

    @property
    def units(self) -> Tensor:
        """Number of active elements of each unit over all images, int64, (units,)."""
        if self.channels_last:
            return self.active.reshape(-1, self.active.shape[-1]).sum(0)
        return self.active.reshape(len(self.active), -1).sum(1)


@dataclass
class UnitCounts:
    """Counts of all activations of a network by name, in the order of the forward pass.

    A unit is active where its pre-activation is above 0, and dead if it is active nowhere.
    """

    layers: dict[str, LayerCounts] = field(default_factory=dict)

    @property
    def dead_units(self) -> float:
        """Fraction of all units that were active nowhere."""
        dead = [layer.units == 0 for layer in self.layers.values()]
        return torch.cat(dead).double().mean().item() if dead else 0.0

    @property
    def dead_elements(self) -> float:
        """Fraction of all elements (unit and position) that were active nowhere."""
        dead = [(layer.active == 0).flatten() for layer in self.layers.values()]
        return torch.cat(dead).double().mean().item() if dead else 0.0

    @property
    def sparsity(self) -> float:
        """Fraction of all pre-activations that were not above 0."""
        active = sum(layer.active.sum().item() for layer in self.layers.values())
        seen = sum(layer.seen for layer in self.layers.values())
        return 1 - active / seen if seen else 0.0

    def add_up_processes(self, device: torch.device) -> None:
        """Sum the counts over a process group, in place; a process without images counts as 0."""
        mine = [(n, c.kind, c.channels_last, tuple(c.active.shape), c.images, c.seen) for n, c in self.layers.items()]
        of_all: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_all, mine)
        total: dict[str, LayerCounts] = {}
        for name, kind, channels_last, shape, images, seen in (layer for part in of_all for layer in part):
            empty = torch.zeros(shape, dtype=torch.int64, device=device)
            total.setdefault(name, LayerCounts(kind, channels_last, empty)).add(empty, images, seen)
        for name, layer in total.items():
            if name in self.layers:
                layer.add(self.layers[name].active.to(device), 0, 0)
            dist.all_reduce(layer.active)
        self.layers = total


@contextmanager
def count_units(model: nn.Module) -> Iterator[UnitCounts]:
    """Count the active units of every activation of `model` during the forward passes inside this context.

    Counts the modules and function-valued attributes that `timm_sugar.convert` knows as activations, and PReLU, outside
    of gates. Functions that a forward calls directly (``F.relu(x)``) cannot be counted:
    `timm_sugar.activations.called_activations` lists them. An activation that is called several times in a forward pass
    counts as several, in order of calls. `timm_sugar.activations.watch_activations` documents the dimension of units.

    Memory use does not depend on the number of images: one int64 for each element of a single image.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
        >>> with torch.no_grad(), count_units(model) as counts:
        ...     _ = model[0].weight.fill_(-1), model[0].bias.fill_(0), model(torch.ones(8, 2))  # (8, 2) -> (8, 4)
        >>> counts.dead_units, counts.layers["1"].active.shape  # one count for each of the 4 units
        (1.0, torch.Size([4]))
    """
    counts = UnitCounts()
    calls: dict[str, int] = {}

    def count(name: str, x: Tensor, channels_last: bool) -> None:
        calls[name] = calls.get(name, 0) + 1
        key = name if calls[name] == 1 else f"{name}:{calls[name]}"
        if key not in counts.layers:
            with torch.inference_mode(False):  # so that in-place updates work outside of inference mode too
                active = torch.zeros(x.shape[1:], dtype=torch.int64, device=x.device)
            counts.layers[key] = LayerCounts(kinds[name], channels_last, active)
        # A uint8 sum holds up to 255 images, and takes a tenth of the time of an int64 sum.
        for part in (x > 0).view(torch.uint8).split(255):
            counts.layers[key].add(part.sum(0, dtype=torch.uint8), len(part), part.numel())

    kinds = {found.name: found.kind or "" for found in watchable_activations(model)}
    with watch_activations(model, count) as watched:
        watched.callback(model.register_forward_pre_hook(lambda *_: calls.clear()).remove)
        yield counts


def _pad(counts: Tensor, shape: tuple[int, ...]) -> Tensor:
    missing = [(0, wanted - there) for there, wanted in zip(counts.shape, shape, strict=True)]
    return F.pad(counts, [n for pair in reversed(missing) for n in pair])
