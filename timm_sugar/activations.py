"""Find the activations of any network: modules, function-valued attributes, and functions called in a forward.

`convert` replaces them, `DeadUnitMonitor` and `timm_sugar.analysis` count them, all with the same definition.
"""

import ast
import copy
import inspect
import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from functools import cache, partial
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Names of activation classes, wherever they are defined (torch, timm, transformers, a user's file), and of functions.
KINDS = {
    "relu": ("ReLU", "relu", "relu_"),
    "gelu": (
        *("GELU", "GELUTanh", "QuickGELU", "GELUActivation", "NewGELUActivation", "FastGELUActivation"),
        *("QuickGELUActivation", "AccurateGELUActivation", "ClippedGELUActivation", "PytorchGELUTanh"),
        *("gelu", "gelu_tanh", "quick_gelu"),
    ),
    "silu": ("SiLU", "Swish", "SwishMe", "SiLUActivation", "MemoryEfficientSwish", "silu", "swish", "swish_me"),
    "mish": ("Mish", "MishMe", "MishActivation", "HardMish", "HardMishMe", "mish", "mish_me", "hard_mish"),
    "elu": ("ELU", "elu", "elu_"),
    "celu": ("CELU", "celu", "celu_"),
    "selu": ("SELU", "selu", "selu_"),
    "leaky_relu": ("LeakyReLU", "leaky_relu", "leaky_relu_"),
    "sugar": ("Sugar", "BSiLU", "NeLU", "sugar", "surrogate_activation", "apply_sugar"),
    "relu6": ("ReLU6", "relu6"),
    "hard_swish": ("Hardswish", "HardSwish", "HardSwishMe", "hardswish", "hard_swish", "hard_swish_me"),
    "prelu": ("PReLU", "prelu"),
}
LEARNED = ("prelu",)  # have parameters
_KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}

_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)

# Modules that compute a gate: the ReLU between the two layers of a squeeze-excite does not count as an activation.
_GATE = re.compile(
    r"Squeeze(And)?Excit|(^|[a-z])(SE|Ese)(Module|Layer|Block|Unit)?$|Coord(inate)?Att|ChannelAttn|Cbam|GatherExcite"
    r"|^GlobalContext$"
)


class Activation(NamedTuple):
    """An attribute of a module: a module without children, or a function.

    Attributes:
        parent, key: The module that holds it, and the name of the attribute.
        name: Full name in the network.
        value: The module or function.
        kind: A key of `KINDS`; None for a module that is not a known activation.
        gate: Whether it is part of a gate.
    """

    parent: nn.Module
    key: str
    name: str
    value: Any
    kind: str | None
    gate: bool


def find_activations(model: nn.Module) -> Iterator[Activation]:
    """Yield the modules without children and the attributes that hold an activation function, in order of definition.

    A module with two names is yielded under both.
    """
    for prefix, parent, gate in _named_modules(model):
        if kind_of(parent) is not None:  # transformers' GELU module itself holds a function
            continue
        for key, value in [*parent._modules.items(), *vars(parent).items()]:
            kind = kind_of(value)
            if kind is not None or (isinstance(value, nn.Module) and not any(value.children())):
                yield Activation(parent, key, f"{prefix}.{key}".lstrip("."), value, kind, gate)


def activation_kinds(model: nn.Module) -> list[str]:
    """Return the kinds of activation that a network has outside of gates, as modules or attributes, sorted."""
    return sorted({found.kind for found in find_activations(model) if found.kind is not None and not found.gate})


def called_activations(model: nn.Module, kinds: Collection[str] = tuple(KINDS)) -> dict[str, list[str]]:
    """Return the activation functions that forwards outside gates call, such as ``{"layer1.0": ["relu"]}``."""
    found = {}
    for name, module, gate in _named_modules(model):
        if not gate and kind_of(module) is None:
            cls: type = type(module)
            calls = sorted(call for call in _function_calls(cls) if _KIND_OF[call] in kinds)
            if calls:
                found[name] = calls
    return found


def calls_summary(model: nn.Module, called: Mapping[str, list[str]]) -> str:
    """Return ``"relu in the forward of BasicConv2d (94 times, first in 'conv1')"``, one phrase for each class."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, calls in called.items():
        groups.setdefault((type(model.get_submodule(name)).__name__, ", ".join(calls)), []).append(name)
    return "; ".join(
        f"{calls} in the forward of {cls} ({len(names)} times, first in {names[0]!r})"
        for (cls, calls), names in groups.items()
    )


def kind_of(value: Any) -> str | None:
    """Return the kind of activation of a module or function, a key of `KINDS`; None for anything else."""
    if isinstance(value, nn.Module):
        kind = next((_KIND_OF[c.__name__] for c in type(value).__mro__ if c.__name__ in _KIND_OF), None)
        learns = kind not in LEARNED and any(True for _ in value.parameters())
        return None if learns or any(value.children()) else kind
    function = function_of(value)
    return None if function is None else _KIND_OF.get(function.__name__)


def function_of(value: Any) -> Callable[..., Any] | None:
    """Return `value` if it is a plain function, or the function of a `partial`; None for anything else."""
    while isinstance(value, (partial, Watched)):
        value = value.func
    return value if isinstance(value, (FunctionType, BuiltinFunctionType)) else None


def name_of(activation: Any) -> str:
    """Return the name of an activation's class or function."""
    function = function_of(activation)
    return type(activation).__name__ if function is None else function.__name__


def watch_activations(model: nn.Module, see: Callable[[str, Tensor, bool], None]) -> ExitStack:
    """Call ``see(name, x, channels_last)`` before each activation of `model` that is outside of gates.

    This covers modules and attributes that hold a function; a module with two names is reported under the first.
    Copies of the model, by deepcopy or pickle, are not watched.

    Units are the last dimension of a linear layer's output, and dimension 1 after a convolution, BatchNorm or
    GroupNorm. `channels_last` follows the most recent of these layers whose input has as many dimensions as x. If
    there is none, units are the last of three dimensions (tokens), and dimension 1 of four or more (images). After a
    convolution that got one image without a batch dimension, and for a vector, x gets a batch dimension of 1.

    Returns:
        A context that removes all hooks when it is closed.
    """
    channels_last: dict[int, bool] = {}  # by number of dimensions
    batched: dict[int, bool] = {}  # likewise

    # The layout is noted during Dynamo's trace, in call order. It passes only constants to such functions.
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def reset_layout() -> None:
        channels_last.clear()
        batched.clear()

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def note_layout(dimensions: int, last: bool, is_batch: bool) -> None:
        channels_last[dimensions], batched[dimensions] = last, is_batch

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def is_last(dimensions: int) -> bool:
        return channels_last.get(dimensions, dimensions == 3)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def is_batched(dimensions: int) -> bool:
        return batched.get(dimensions, dimensions > 1)

    def note(last: bool, batch_dimensions: int) -> Callable[..., None]:
        def call(_: Any, *given: Any) -> None:
            dimensions = _input(*given).ndim
            note_layout(dimensions, last, dimensions >= batch_dimensions)

        return call

    def watch(name: str) -> Callable[..., None]:
        def call(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _input(args, kwargs)
            see(name, x if is_batched(x.ndim) else x.reshape(1, *(x.shape or (1,))), is_last(x.ndim))

        return call

    watched = ExitStack()
    watched.callback(model.register_forward_pre_hook(Hook(lambda *_: reset_layout())).remove)
    for module in model.modules():
        if isinstance(module, (nn.Linear, *_CHANNELS_FIRST)):
            hook = Hook(note(isinstance(module, nn.Linear), _batch_dimensions(module)))
            watched.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
    for parent, key, name, value, _, _ in watchable_activations(model):
        if isinstance(value, nn.Module):
            watched.callback(value.register_forward_pre_hook(Hook(watch(name)), with_kwargs=True).remove)
        else:
            replaced = Watched(value, watch(name))
            setattr(parent, key, replaced)
            watched.callback(_unwrap, parent, key, replaced)
    return watched


def _batch_dimensions(module: nn.Module) -> int:
    """Return the number of dimensions from which on an input of `module` is a batch."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return len(module.kernel_size) + 2
    kinds = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    return next((number for number, kind in enumerate(kinds, 3) if isinstance(module, kind)), 2)


def watchable_activations(model: nn.Module) -> list[Activation]:
    """Return the known activations outside of gates; a module with several names appears once."""
    found, shared = [], set()
    for activation in find_activations(model):
        if activation.kind is not None and not activation.gate and id(activation.value) not in shared:
            found.append(activation)
            if isinstance(activation.value, nn.Module):
                shared.add(id(activation.value))
    return found


class Hook:
    """A hook that does nothing in a copy of its module."""

    def __init__(self, call: Callable[..., None] | None = None):
        self.call = call

    def __call__(self, module: nn.Module, *args: Any) -> None:
        if self.call is not None:
            self.call(module, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, ()

    @property
    def __name__(self) -> str:  # read by torch.jit.script
        raise AttributeError("a network whose activations are watched cannot be scripted: detach DeadUnitMonitor first")


class Watched:
    """A function in an attribute of a module; a copy is the plain function."""

    def __init__(self, func: Callable[..., Any], call: Callable[..., None]):
        self.func, self.call = func, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.call(self, args, kwargs)
        return self.func(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return copy.copy, (self.func,)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))  # ``act(input=x)``


def _unwrap(parent: nn.Module, key: str, watched: Watched) -> None:
    """Unwrap `watched` in an attribute, also below a later wrapper; do nothing if the attribute was converted."""
    above, value = None, vars(parent).get(key)
    while isinstance(value, Watched) and value is not watched:
        above, value = value, value.func
    if value is watched and above is not None:
        above.func = watched.func
    elif value is watched:
        setattr(parent, key, watched.func)


def _named_modules(module: nn.Module, prefix: str = "", gate: bool = False) -> Iterator[tuple[str, nn.Module, bool]]:
    """`nn.Module.named_modules` plus a flag: whether the module is, or is part of, a gate. The root never is."""
    seen = set()
    stack = [(prefix, module, gate)]
    while stack:
        name, module, gate = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module, gate
        stack += [
            (f"{name}.{key}".lstrip("."), child, gate or _GATE.search(type(child).__name__) is not None)
            for key, child in reversed(module._modules.items())
            if child is not None
        ]


@cache
def _function_calls(cls: type) -> frozenset[str]:
    """Return the names of the activation functions that the forward of a class calls, directly or indirectly."""
    found: set[str] = set()
    seen: set[Any] = set()

    def visit(function: Any) -> None:
        function = inspect.unwrap(function) if isinstance(function, FunctionType) else function
        if not isinstance(function, (FunctionType, BuiltinFunctionType)) or function in seen:
            return
        seen.add(function)
        if function.__name__ in _KIND_OF:
            found.add(function.__name__)
        elif isinstance(function, FunctionType) and not (function.__module__ or "").startswith("torch."):
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            except (OSError, SyntaxError):
                return
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    visit(callee(node.func, function.__globals__))

    def callee(node: ast.expr, scope: dict[str, Any]) -> Any:
        if isinstance(node, ast.Name):
            return scope.get(node.id)
        if not isinstance(node, ast.Attribute):
            return None
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return inspect.getattr_static(cls, node.attr, None)
        if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", None) == "super":
            return next((vars(c)[node.attr] for c in cls.__mro__[1:] if node.attr in vars(c)), None)
        owner = callee(node.value, scope)
        if isinstance(owner, ModuleType):
            return getattr(owner, node.attr, None)
        return torch.relu if node.attr in ("relu", "relu_") else None  # a tensor's method

    visit(inspect.getattr_static(cls, "forward", None))
    return frozenset(found)
