"""Swapping activations in any network, in place: to SUGAR for training, and to plain ReLU for deployment.

What is a module or an attribute that holds a function is swapped. What a forward calls by name is out of reach; it is
found by reading the forward's source, and reported.
"""

import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, TypeVar

import timm
import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ._timm import model_args, set_model_args
from .activations import (
    KINDS,
    LEARNED,
    called_activations,
    calls_summary,
    find_activations,
    function_of,
    kind_of,
    name_of,
)
from .functional import sugar
from .layers import Sugar, apply_sugar
from .surrogates import get_surrogate, unknown_name

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_REPLACEABLE = KINDS.keys() - LEARNED  # what has parameters stays: the state dict is not to change
_OPT_IN = ("relu6", "hard_swish")
NOT_RECORDED = "the conversion is not part of what a saved model records"


@dataclass
class SugarReport:
    """What `convert` did, by name of the module or attribute.

    Attributes:
        surrogate, alpha, save: What was put in.
        converted: What each swapped activation was, such as ``{"layer1.0.act1": "ReLU"}``.
        gates: Activations left alone because they are part of a gate.
        unreached: Activations that a forward calls by name, such as ``{"layer1.0": ["relu"]}``; not converted.
        recorded: Whether the model's own configuration (timm's model_args, transformers' config) brings a saved
            model back converted; None for a network that has no such configuration.
    """

    surrogate: str
    alpha: float | None
    save: str
    converted: dict[str, str] = field(default_factory=dict)
    gates: dict[str, str] = field(default_factory=dict)
    unreached: dict[str, list[str]] = field(default_factory=dict)
    recorded: bool | None = None

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} activations are now SUGAR {self.surrogate}, alpha {self.alpha}"]
        lines += [f"  {name}: {was}" for name, was in self.converted.items()]
        lines += [f"  {name}: {was}, left alone as part of a gate" for name, was in self.gates.items()]
        lines += [f"  {name}: calls {', '.join(calls)}, out of reach" for name, calls in self.unreached.items()]
        return "\n".join(lines)


@register_notrace_module
class _SugarFunction(Sugar):
    """SUGAR in an attribute that held a function. timm calls those with `inplace` by name."""

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        if torch.jit.is_scripting():
            return F.relu(x)
        else:
            return sugar(x, self.surrogate, self.alpha, self.save)


def convert(
    model: ModuleT,
    surrogate: str = "bsilu",
    alpha: float | None = None,
    save: str = "exact",
    replace: str | type | Iterable[str | type] | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> ModuleT:
    """Replace the activations of any network by SUGAR, in place; the forward becomes that of a ReLU network.

    Reaches modules (torch's, timm's, transformers' and any class of the same name without parameters) and attributes
    that hold a function. What a forward calls by name stays as it is and is named in a warning. Gates stay as they
    are: squeeze-excite, coordinate attention, sigmoid, hard-sigmoid and, unless asked for, hard-swish.

    Args:
        model: Any network. Its state dict, hooks and train/eval state do not change.
        surrogate: A name of `list_surrogates()`.
        alpha: Shape parameter of the surrogate; None takes its default.
        save: What is kept for the backward, as in `timm_sugar.sugar`.
        replace: What to replace: kinds by name ("relu", "gelu", "silu", "mish", "elu", "celu", "selu", "leaky_relu",
            "sugar", "relu6", "hard_swish") or classes. None takes all but relu6 and hard_swish.
        include: fnmatch patterns on the names of the activations; only those that match one are replaced.
        exclude: Patterns of names to leave alone.

    Returns:
        The model itself, with a `SugarReport` as `model.sugar_report`. Where timm or transformers built it, the
        configuration that they save with it is changed too, so that the model comes back converted; where this cannot
        express the conversion, a warning says so.

    Raises:
        ValueError: there is nothing to replace, or a name, alpha or save mode is not valid.
    """
    new = Sugar(surrogate, alpha, save=save)
    kinds, classes = _resolve_replace(replace)
    report = SugarReport(new.surrogate, new.alpha, new.save)
    swaps = []
    for parent, key, name, old, kind, gate in find_activations(model):
        if not (kind in kinds or (isinstance(old, nn.Module) and isinstance(old, classes))):
            continue
        if not _selected(name, include, exclude):
            continue
        if gate:
            report.gates[name] = name_of(old)
        else:
            report.converted[name] = name_of(old)
            swaps.append((parent, key, old))
    called = called_activations(model, kinds)
    report.unreached = {name: calls for name, calls in called.items() if _selected(name, include, exclude)}
    if not swaps:
        raise ValueError(f"nothing to replace by SUGAR in {type(model).__name__}{_why_nothing(model, report)}")

    def make(old: Any) -> Sugar:
        if isinstance(old, nn.Module) and not isinstance(old, _SugarFunction):
            return Sugar(new.surrogate, new.alpha, bool(getattr(old, "inplace", False)), new.save)
        return _SugarFunction(new.surrogate, new.alpha, save=new.save)

    _swap(swaps, make)
    _disable_fast_paths(model)
    report.recorded = _record(model, new)
    converted: Any = model
    converted.sugar_report = report
    if report.unreached:
        warnings.warn(f"convert does not reach {calls_summary(model, report.unreached)}", stacklevel=2)
    if report.recorded is False:
        warnings.warn(f"{NOT_RECORDED}: a reload gives the original activations; convert it again", stacklevel=2)
    return model


def to_relu(model: ModuleT) -> ModuleT:
    """Replace every `Sugar` by `nn.ReLU`, in place: what a network that was trained with SUGAR is at inference.

    The state dict stays the same and the outputs stay bit-identical. A network without SUGAR is returned as it is.

    Args:
        model: Any network.

    Returns:
        The model itself; where timm or transformers built it, a saved model comes back with ReLU.
    """
    swaps = [
        (found.parent, found.key, found.value)
        for found in find_activations(model)
        if isinstance(found.value, Sugar) or function_of(found.value) in (apply_sugar, sugar)
    ]
    as_module = [old for _, _, old in swaps if isinstance(old, Sugar) and not isinstance(old, _SugarFunction)]
    _swap(swaps, lambda old: nn.ReLU(old.inplace) if old in as_module else F.relu)
    vars(model).pop("sugar_report", None)
    if swaps and _record(model, None) is False:
        warnings.warn(f"{NOT_RECORDED}: a reload does not give ReLU; apply to_relu again", stacklevel=2)
    return model


def _resolve_replace(replace: str | type | Iterable[str | type] | None) -> tuple[set[str], tuple[type, ...]]:
    if replace is None:
        return _REPLACEABLE - {*_OPT_IN}, ()
    kinds, classes = set(), []
    for item in [replace] if isinstance(replace, (str, type)) else replace:
        if isinstance(item, type):
            classes.append(item)
        elif item in _REPLACEABLE:
            kinds.add(item)
        else:
            raise ValueError(unknown_name("activation to replace", item, sorted(_REPLACEABLE)))
    return kinds, tuple(classes)


def _selected(name: str, include: str | Iterable[str] | None, exclude: str | Iterable[str] | None) -> bool:
    def matches(patterns: str | Iterable[str]) -> bool:
        return any(fnmatchcase(name, p) for p in ([patterns] if isinstance(patterns, str) else patterns))

    return (include is None or matches(include)) and not (exclude is not None and matches(exclude))


def _swap(swaps: list[tuple[nn.Module, str, Any]], make: Callable[[Any], Any]) -> None:
    """Set each attribute to what `make` gives for its old value; a module that was shared stays shared."""
    made: dict[int, Any] = {}
    for parent, key, old in swaps:
        new = made.get(id(old)) if isinstance(old, nn.Module) else None
        if new is None:
            new = made[id(old)] = make(old)
            if isinstance(old, nn.Module) and isinstance(new, nn.Module):
                new.train(old.training)
                vars(new).update({k: v for k, v in vars(old).items() if "hook" in k})
        if not isinstance(new, nn.Module):  # a submodule cannot be overwritten by a function
            delattr(parent, key)
        setattr(parent, key, new)


def _disable_fast_paths(model: nn.Module) -> None:
    # torch's fused kernels for nn.TransformerEncoderLayer in eval() compute GELU or ReLU without asking the layer.
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and isinstance(module.activation, Sugar):
            module.activation_relu_or_gelu = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            not getattr(layer, "activation_relu_or_gelu", 0) for layer in module.layers
        ):
            module.use_nested_tensor = False


def _why_nothing(model: nn.Module, report: SugarReport) -> str:
    if report.unreached:
        return f": out of reach are {calls_summary(model, report.unreached)}"
    left = {name_of(found.value) for found in find_activations(model) if found.kind is not None}
    return f": left as they are {', '.join(sorted(left))}" if left else ": it has no activation module or attribute"


def _record(model: nn.Module, new: Sugar | None) -> bool | None:
    """Make the model's configuration build what the model now is: SUGAR as in `new`, or ReLU.

    Whether it does is tried out, by building the network once more on the meta device.
    """
    if isinstance(getattr(model, "pretrained_cfg", None), dict) and model_args(model) is not None:
        return _record_in_timm(model, new)
    if hasattr(model, "from_pretrained") and hasattr(getattr(model, "config", None), "to_dict"):
        return _record_in_transformers(model, new)
    return None


def _record_in_timm(model: Any, new: Sugar | None) -> bool:
    own = ("surrogate", "alpha", "save", "act_layer")
    kept = {k: v for k, v in (model_args(model) or {}).items() if k not in own}
    if new is None:
        candidates: list[dict[str, Any]] = [{}, {"act_layer": "relu"}]
    else:
        ours: dict[str, Any] = {
            "surrogate": new.surrogate,
            "alpha": new.alpha,
            "save": new.save if new.save != "exact" else None,
        }
        candidates = [{k: v for k, v in ours.items() if v is not None}]
        if _is_default(new):
            candidates.append({"act_layer": f"sugar_{new.surrogate}"})
    for candidate in candidates:
        args = kept | candidate
        if _builds(model, partial(timm.create_model, model.pretrained_cfg["architecture"], **args)):
            set_model_args(model, args)
            return True
    return False


def _record_in_transformers(model: Any, new: Sugar | None) -> bool:
    from . import transformers  # registers our names, and is loaded already where there is such a model

    if new is not None and not _is_default(new):
        return False
    name = "relu" if new is None else f"sugar_{new.surrogate}"

    def set_activations(config: Any) -> Any:
        for key, value in list(vars(config).items()):
            if hasattr(value, "to_dict"):
                set_activations(value)
            elif "act" in key and transformers.is_activation(value, lambda module: kind_of(module) is not None):
                setattr(config, key, name)
        return config

    if not _builds(model, lambda: type(model)(set_activations(deepcopy(model.config)))):
        return False
    set_activations(model.config)
    return True


def _is_default(new: Sugar) -> bool:
    return new.alpha == get_surrogate(new.surrogate).alpha and new.save == "exact"


def _builds(model: nn.Module, build: Callable[[], nn.Module]) -> bool:
    """Whether `build` gives a network with the same activations at the same places."""

    def layout(model: nn.Module) -> dict[str, tuple[Any, ...]]:
        return {
            name: (old.surrogate, old.alpha, old.save) if isinstance(old, Sugar) else (name_of(old),)
            for _, _, name, old, kind, _ in find_activations(model)
            if kind is not None
        }

    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return layout(build()) == layout(model)
    except Exception:  # whatever a constructor raises, the answer is no
        return False
