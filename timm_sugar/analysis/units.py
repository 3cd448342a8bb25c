"""Which units of a network are active: counted at its activations during an evaluation pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import activations, activations_me
from torch import Tensor, nn

from ..layers import BSiLU, NeLU, Sugar

RECTIFIERS: tuple[type[nn.Module], ...] = (
    Sugar, BSiLU, NeLU,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    activations.GELU, activations.GELUTanh, activations.QuickGELU, activations.PReLU, activations.Swish,
    activations.Mish, activations_me.SwishMe, activations_me.MishMe,
)  # fmt: skip


@dataclass
class UnitCounts:
    """How often each element of each activation's input was above 0.

    A unit is a channel of a convolution or a feature of a linear layer; an element is a unit at one position. It is
    active where its pre-activation is above 0, and dead if it is active nowhere.

    Attributes:
        active: Activation's name -> int64 counts of active images, shape of its input without the batch dimension.
        channels_last: Activation's name -> whether units are on the last dimension instead of the first.
        images: Number of images seen by each activation.
    """

    active: dict[str, Tensor] = field(default_factory=dict)
    channels_last: dict[str, bool] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)

    def units(self, name: str) -> Tensor:
        """Return the number of active elements of each unit of the activation `name`, int64, (units,)."""
        counts = self.active[name]
        return counts.reshape(-1, counts.shape[-1]).sum(0) if self.channels_last[name] else counts.flatten(1).sum(1)

    @property
    def dead_units(self) -> float:
        """Fraction of all units that were active nowhere."""
        dead = [self.units(name) == 0 for name in self.active]
        return torch.cat(dead).double().mean().item() if dead else 0.0

    @property
    def dead_elements(self) -> float:
        """Fraction of all elements (unit and position) that were active nowhere."""
        dead = [(counts == 0).flatten() for counts in self.active.values()]
        return torch.cat(dead).double().mean().item() if dead else 0.0

    @property
    def sparsity(self) -> float:
        """Fraction of all pre-activations that were not above 0."""
        active = sum(counts.sum().item() for counts in self.active.values())
        total = sum(counts.numel() * self.images[name] for name, counts in self.active.items())
        return 1 - active / total if total else 0.0

    def add_up_processes(self, device: torch.device) -> None:
        """Replace the counts of each process of a process group by their sum; one that saw no images counts as 0."""
        mine = {name: (tuple(counts.shape), self.channels_last[name]) for name, counts in self.active.items()}
        layouts: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(layouts, mine)
        layout = {name: spec for part in layouts for name, spec in part.items()}
        for name, (shape, channels_last) in layout.items():
            counts = self.active.get(name, torch.zeros(shape, dtype=torch.int64)).to(device)
            counts = counts.clone()  # of an inference tensor: one that may be reduced in place
            images = torch.tensor(self.images.get(name, 0), device=device)
            dist.all_reduce(counts)
            dist.all_reduce(images)
            self.active[name], self.channels_last[name] = counts, channels_last
            self.images[name] = int(images.item())


@contextmanager
def count_units(model: nn.Module) -> Iterator[UnitCounts]:
    """Count the active units of every activation of `model` during the forward passes inside this context.

    An activation module that is called several times in a forward pass counts as several, in order of calls. Memory
    does not depend on the number of images.
    """
    counts = UnitCounts()
    calls: dict[str, int] = {}
    after_linear = False  # units are features, on the last dimension, after a linear layer; channels otherwise

    def begin(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.clear()

    def note_layer(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal after_linear
        after_linear = isinstance(module, nn.Linear)

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            calls[name] = calls.get(name, 0) + 1
            key = name if calls[name] == 1 else f"{name}:{calls[name]}"
            active = (x > 0).sum(0)
            if key in counts.active:
                counts.active[key] += active
            else:
                counts.active[key] = active
                counts.channels_last[key] = after_linear
            counts.images[key] = counts.images.get(key, 0) + len(x)

        return count

    handles = [model.register_forward_pre_hook(begin)]
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            handles.append(module.register_forward_hook(note_layer))
        elif isinstance(module, RECTIFIERS):
            handles.append(module.register_forward_pre_hook(hook(name)))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
