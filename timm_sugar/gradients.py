"""Check, before training, that the surrogate gradient reaches the parameters of a compiled or wrapped model."""

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ._torch import post_accumulate_hooks
from .functional import composed, computed_by
from .surrogates import Surrogate

# A parameter's gradient counts as the surrogate's if its distance to that gradient is below this fraction of the
# distance between the surrogate's and ReLU's. The second value is for autocast, 16 bits and lean saving. _ROUNDING is
# the relative rounding error between two ways to compute a gradient.
_NEAR, _LOW_NEAR = 0.05, 0.25
_ROUNDING = {torch.float64: 1e-6, torch.float32: 2e-3}  # float32 may be TensorFloat-32
_LOW_ROUNDING = 0.05

Gradients = dict[str, Tensor]


def check_gradients(model: nn.Module, *inputs: Any, **kwargs: Any) -> None:
    """Check, before a long training run, that every SUGAR activation of a model passes on its surrogate's gradient.

    Runs one forward and backward pass of the model as it is: compiled, wrapped by DDP or FSDP, under the autocast of
    the caller. The gradients of its parameters are compared with those of the same network run eagerly with the
    composed formula, and with those of plain ReLU. Gradients, weights, buffers, random state and mode are restored.
    Post-accumulate-grad hooks, such as an optimizer's step in the backward pass, do not run; other hooks do. In a
    compiled network dropout and drop path are turned off during the check, since compiled code draws different random
    numbers than eager mode; the network is therefore recompiled afterwards.

    Args:
        model: Any network. With several processes, all of them must call this, as for a training step.
        *inputs, **kwargs: Arguments of the model: a batch as in training. All floating-point tensors in the output,
            also in nested lists, tuples and dicts, are differentiated.

    Raises:
        RuntimeError: the gradient of an activation is not its surrogate's; the message names the first such layer.

    Warns:
        UserWarning: the check is inconclusive: no SUGAR activation runs in eager mode (an exported or scripted
            network), no parameter before one is trained, the surrogate differs from ReLU by less than the rounding of
            the dtype, a gradient is not finite, or the network draws random numbers that differ between calls.

    Examples:
        >>> model = torch.compile(timm.create_model("resnet18_sugar_bsilu", num_classes=10))
        >>> timm_sugar.check_gradients(model, torch.randn(8, 3, 32, 32))
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inputs, kwargs = _detached(inputs), _detached(kwargs)
    with _preserved_state(model, inputs, kwargs) as again, torch.enable_grad():

        def gradients(seed: int = 0) -> Gradients:
            again(seed)
            _backward(model(*inputs, **kwargs))
            return {name: _whole(p.grad) for name, p in trained.items() if p.grad is not None}

        found = gradients()
        calls = _Calls(model)

        def as_reference(lost: set[int], seed: int = 0) -> Gradients:
            with torch.compiler.set_stance("force_eager"), calls.with_relu_at(lost):
                return gradients(seed)

        wanted = as_reference(set())
        if not calls.names:
            return _cannot_tell("no SUGAR activation runs eagerly in this model")
        everything = {*range(len(calls.names))}
        relu = as_reference(everything)
        lean = any(getattr(module, "save", None) in ("uint8", "uint4") for module in model.modules())
        verdicts = _verdicts(found, wanted, relu, lean)
        if "wrong" in verdicts.values():
            if "wrong" in _verdicts(as_reference(set(), seed=1), wanted, relu, lean).values():
                return _cannot_tell("the network draws random numbers, and other ones than it does in eager mode")
            raise RuntimeError(_explanation(calls, found, relu, as_reference, verdicts))
    unclear = [name for name, verdict in verdicts.items() if verdict == "unclear"]
    if unclear:
        _cannot_tell(
            f"the surrogate's gradient is as near to ReLU's as this dtype rounds, or not finite, first at {unclear[0]}"
        )
    elif "right" not in verdicts.values():
        _cannot_tell("no parameter before a SUGAR activation is trained")


def _cannot_tell(why: str) -> None:
    warnings.warn(f"check_gradients cannot tell whether the surrogate gradient arrives: {why}", stacklevel=3)


def _verdicts(found: Gradients, wanted: Gradients, relu: Gradients, lean: bool) -> dict[str, str]:
    """Return "right", "wrong", "unclear", or "same" (the surrogate makes no difference) for each parameter."""
    low = any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    sizes = sorted(float(value.double().square().mean().sqrt()) for value in wanted.values())
    typical = sizes[len(sizes) // 2] if sizes else 0.0
    verdicts = {}
    for name in wanted:
        rounding = _LOW_ROUNDING if low else _ROUNDING.get(wanted[name].dtype, _LOW_ROUNDING)
        near = _LOW_NEAR if lean or rounding == _LOW_ROUNDING else _NEAR
        mine = found[name].double() if name in found else torch.zeros_like(wanted[name]).double()
        # With lean saving the errors of the codes add up over the layers, so only the direction is checked.
        allowed = 1.0 if lean else rounding
        verdicts[name] = _verdict(mine, wanted[name].double(), relu[name].double(), rounding, allowed, near, typical)
    return verdicts


def _verdict(
    found: Tensor, wanted: Tensor, relu: Tensor, rounding: float, allowed: float, near: float, typical: float
) -> str:
    size, apart = wanted.norm(), (wanted - relu).norm()
    error = (found - wanted).norm()
    if not (error + apart).isfinite():
        return "unclear"
    if max(size, error, relu.norm()) <= rounding * typical * wanted.numel() ** 0.5:
        return "same"  # 0 up to rounding, such as the gradient of a bias before BatchNorm
    if error > allowed * size and error > near * apart:
        return "wrong"
    if apart <= 1e-2 * rounding * size:
        return "same" if apart == 0 else "unclear"
    # Rounding errors are random: few lie along the line from ReLU's gradient to the surrogate's.
    along = ((found - relu) * (wanted - relu)).sum() / apart**2
    if along >= 1 - near:
        return "right"
    return "wrong" if along <= _LOW_NEAR else "unclear"


class _Calls:
    """The SUGAR activations that run eagerly, in the order of a forward pass."""

    def __init__(self, model: nn.Module):
        self.names: list[str] = []
        self.order: list[tuple[str, int]] = []  # entered modules, and the number of activations before each
        self._model = model

    @contextmanager
    def with_relu_at(self, lost: set[int]) -> Iterator[None]:
        """Compute the activations with numbers in `lost` as ReLU, the others by the composed formula."""
        self.names, self.order, inside = [], [], [""]

        def reference(x: Tensor, surrogate: Surrogate, alpha: float | None) -> Tensor:
            name, number = inside[-1] or "the network", len(self.names)
            self.names.append(name)
            return torch.relu(x) if number in lost else composed(x, surrogate, alpha)

        def enter(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                inside.append(name)
                self.order.append((name, len(self.names)))

            return hook

        def leave(*_: Any) -> None:
            inside.pop()

        with ExitStack() as hooks, computed_by(reference):
            for name, module in self._model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                    continue
                hooks.callback(module.register_forward_pre_hook(enter(name)).remove)
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield


def _explanation(
    calls: _Calls,
    found: Gradients,
    relu: Gradients,
    as_reference: Callable[[set[int]], Gradients],
    verdicts: dict[str, str],
) -> str:
    """Find the activations that lost their gradient, from the last to the first: each affects all layers before it."""

    def distance(reference: Gradients, names: list[str]) -> float:
        return sum(float((found[n].double() - reference[n].double()).norm()) for n in names if n in found)

    everything = {*range(len(calls.names))}
    order = dict(calls.order)
    before = {name: order.get(name.rpartition(".")[0], 0) for name in relu}
    lost = everything
    if distance(relu, [*relu]) > 1e-3 * sum(float(value.double().norm()) for value in relu.values()):
        lost, current = set(), as_reference(set())
        for number in sorted(everything, reverse=True):
            nearest = max((place for place in before.values() if place <= number), default=0)
            names = [name for name, place in before.items() if place == nearest]
            candidate = as_reference(lost | {number})
            if distance(candidate, names) < distance(current, names):
                lost, current = lost | {number}, candidate
    if (distance(as_reference(lost), [*relu]) > _LOW_NEAR * distance(relu, [*relu]) and lost != everything) or not lost:
        wrong = [name for name in relu if verdicts.get(name) == "wrong"]
        last = max(wrong, key=lambda name: before[name])
        culprit = calls.names[min(before[last], len(calls.names) - 1)]
        return (
            f"the gradient that {culprit} passes on is neither its surrogate's nor ReLU's (seen at the parameter "
            f"{last}): is its input overwritten after the activation, or its alpha another in a compiled network?"
        )
    others = f", and so do {len(lost) - 1} of the others" if len(lost) > 1 else ""
    return (
        f"{calls.names[min(lost)]} passes on ReLU's gradient, not its surrogate's{others} (of {len(calls.names)} SUGAR "
        "activations): as this model is compiled or wrapped, it would train as a ReLU network; train it without "
        "torch.compile, or with another backend"
    )


def _backward(outputs: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    total: Any = 0.0
    for value in _tensors(outputs):
        if value.is_floating_point() and value.requires_grad:
            weights = torch.randn(value.shape, generator=generator).to(value.device)
            total = total + (value.float() * weights).mean()
    if isinstance(total, Tensor):
        total.backward()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _detached(value: Any) -> Any:
    """Return detached inputs: they share the values, but have no graph or gradient."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    return type(value)(map(_detached, value)) if type(value) in (list, tuple) else value


def _whole(grad: Tensor) -> Tensor:
    whole: Tensor = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.detach().clone()  # FSDP shards
    return whole


@contextmanager
def _preserved_state(model: nn.Module, *inputs: Any) -> Iterator[Callable[[int], None]]:
    """Yield a function that resets the state for a pass with a seed; restore the original state at the end."""
    leaves = [*model.parameters(), *(t for t in _tensors(inputs) if t.is_leaf and t.requires_grad)]
    grads = [leaf.grad for leaf in leaves]
    hooks = [(found, dict(found)) for leaf in leaves if (found := post_accumulate_hooks(leaf))]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {t.device.index for t in (*leaves, *_tensors(inputs)) if t.is_cuda}
    rates = _random_rates(model) if _is_compiled(model) else []
    python, numpy = random.getstate(), np.random.get_state()

    def again(seed: int) -> None:
        for leaf in leaves:
            leaf.grad = None
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    with torch.random.fork_rng([*devices]):
        try:
            for module, name, _ in rates:
                setattr(module, name, 0.0)
            for found, _ in hooks:
                found.clear()
            yield again
        finally:
            for found, kept in hooks:
                found.update(kept)
            for module, name, rate in rates:
                setattr(module, name, rate)
            again(0)
            for leaf, grad in zip(leaves, grads, strict=True):
                leaf.grad = grad
            random.setstate(python)
            np.random.set_state(numpy)


def _is_compiled(model: nn.Module) -> bool:
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())


def _random_rates(model: nn.Module) -> list[tuple[nn.Module, str, float]]:
    found: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        for kind, name in ((nn.modules.dropout._DropoutNd, "p"), (DropPath, "drop_prob")):
            if isinstance(module, kind) and getattr(module, name):
                found.append((module, name, getattr(module, name)))
    return found
