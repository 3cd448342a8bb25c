"""Cost of an activation in training: time per step of a whole network, and memory saved for the backward pass."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import get_act_layer
from torch import Tensor, nn

from ..functional import SAVE_MODES, forward_gradient_injection
from ..layers import Sugar
from ..models import size_arguments
from ..surrogates import get_surrogate, unknown_name


class Injected(nn.Module):
    """Forward gradient injection as in the paper, direct (eq. 5) or indirect (eq. 4)."""

    def __init__(self, surrogate: str, direct: bool, inplace: bool = False):
        super().__init__()
        self.surrogate, self.direct = surrogate, direct

    def forward(self, x: Tensor) -> Tensor:
        if not self.direct:
            return forward_gradient_injection(x, torch.relu, self.surrogate)
        entry = get_surrogate(self.surrogate)
        m = x * entry.derivative(x, entry.alpha).detach()
        return m - m.detach() + torch.relu(x).detach()


def activations(surrogate: str) -> dict[str, Callable[..., nn.Module]]:
    """Return the activations that `bench` compares, by name. ReLU and SiLU work in place, as in timm's networks."""
    get_surrogate(surrogate)
    return {
        "relu": partial(nn.ReLU, inplace=True),
        "gelu": get_act_layer("gelu"),
        "silu": partial(nn.SiLU, inplace=True),
        "fgi_direct": partial(Injected, surrogate, True),
        "fgi_indirect": partial(Injected, surrogate, False),
        **{
            "sugar" if save == "exact" else f"sugar_{save}": partial(_create_sugar, surrogate, save)
            for save in SAVE_MODES
        },
    }


def _create_sugar(surrogate: str, save: str, inplace: bool = False) -> Sugar:
    return Sugar(surrogate, inplace=inplace, save=save)


def bench(
    model: str,
    img_size: int = 32,
    batch_size: int = 128,
    surrogate: str = "bsilu",
    only: Sequence[str] | None = None,
    rounds: int = 15,
    compiled: bool | str = False,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    **kwargs: Any,
) -> list[dict[str, Any]]:
    """Time a training step (forward, loss, backward, SGD) of one network with each activation, side by side.

    Args:
        model: A timm model that takes `act_layer`; all of ours do. It is built for 10 classes, from a fixed seed.
        img_size: Size of the random images in pixels.
        batch_size: Images per step.
        surrogate: The surrogate of SUGAR and of forward gradient injection.
        only: Names of `activations`; "relu", the baseline, is always included.
        rounds: Steps per activation, every round in a new random order, after two warm-up rounds.
        compiled: Whether to train with ``torch.compile(fullgraph=True)``, or its mode.
        device: Device; a GPU is synchronised after each step.
        precision: "float32", or "bfloat16" or "float16" for autocast with the network and images in channels_last.
        kwargs: Further arguments of the model.

    Returns:
        A dict for each activation: its name, the median milliseconds per step, images per second, the time relative to
        ReLU, and the MiB of the distinct storages that autograd saves in eager mode, without parameters and buffers,
        with their ratio to ReLU's.

    Raises:
        ValueError: unknown model, surrogate or activation, or a model without act_layer.
    """
    known = activations(surrogate)
    for name in only or ():
        if name not in known:
            raise ValueError(unknown_name("activation", name, [*known]))
    if not timm.is_model(model.split(".")[0]):
        raise ValueError(unknown_name("model", model, timm.list_models()))
    names = list(dict.fromkeys(["relu", *(known if only is None else only)]))
    kwargs = {**size_arguments(model, img_size), **kwargs}
    layout = torch.contiguous_format if precision == "float32" else torch.channels_last
    images = torch.randn(batch_size, 3, img_size, img_size, device=device).contiguous(memory_format=layout)
    autocast = partial(torch.autocast, torch.device(device).type, getattr(torch, precision), precision != "float32")
    labels = torch.arange(batch_size, device=device) % 10
    contestants: dict[str, Callable[[], float]] = {}
    memory: dict[str, int] = {}
    for name in names:
        torch.manual_seed(0)
        try:
            network = timm.create_model(model, num_classes=10, act_layer=known[name], **kwargs).train()
            network = network.to(device).to(memory_format=layout)
        except TypeError as error:
            raise ValueError(f"model {model} takes no act_layer, or not these arguments: {error}") from error
        with autocast():
            memory[name] = saved_bytes(network, images)
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
        run: Any = network
        if compiled:
            run = torch.compile(network, fullgraph=True, mode=compiled if isinstance(compiled, str) else None)
        contestants[name] = partial(_step, run, optimizer, images, labels, autocast)
    seconds = time_shuffled(contestants, rounds)
    return [
        {
            "activation": name,
            "ms": 1e3 * seconds[name],
            "images_per_second": batch_size / seconds[name],
            "vs_relu": seconds[name] / seconds["relu"],
            "eager_saved_mib": memory[name] / 2**20,
            "saved_vs_relu": memory[name] / memory["relu"],
        }
        for name in names
    ]


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Return the bytes of the distinct storages that one forward pass saves for the backward, without weights."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(images)  # keep alive until the bytes are summed, so that no address is reused
    return sum(storage.nbytes() for address, storage in saved.items() if address not in own) if y.requires_grad else 0


def time_shuffled(contestants: dict[str, Callable[[], float]], rounds: int, seed: int = 0) -> dict[str, float]:
    """Return each contestant's median seconds over `rounds`, each in a new random order, after two warm-up rounds.

    A contestant does its work once and returns the measured seconds.
    """
    order = random.Random(seed)
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 2):
        order.shuffle(names)
        for name in names:
            seconds = contestants[name]()
            if i >= 2:
                times[name].append(seconds)
    return {name: statistics.median(times[name]) for name in contestants}


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, autocast: Callable[[], Any]
) -> float:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    start = time.perf_counter()
    optimizer.zero_grad()
    with autocast():
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - start
