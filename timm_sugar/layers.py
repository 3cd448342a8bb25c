"""SUGAR as modules, and their registration in timm's activation factory."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerType, create_act, register_notrace_module
from torch import Tensor, nn

from ._timm import ACT_FUNCTIONS, ACT_LAYERS
from .functional import activate, check_save, sugar, surrogate_activation
from .surrogates import (
    Surrogate,
    SurrogateFunction,
    add_surrogate,
    bsilu,
    get_surrogate,
    list_surrogates,
    nelu,
    unknown_name,
)


@register_notrace_module  # a traced graph keeps the module, which TorchScript can then compile
class Sugar(nn.Module):
    """ReLU in the forward pass, the derivative of a surrogate in the backward pass (arXiv:2505.22074, eq. 4 to 6).

    It has no parameters or buffers, so it replaces `nn.ReLU` without changing the state dict. The surrogate gradient
    applies whenever grad mode is on, in train() and eval() alike.

    Args:
        surrogate: A name of `list_surrogates()`; default the paper's B-SiLU.
        alpha: Shape parameter of the surrogate; None takes its default. It may be changed during training.
        inplace: Overwrite the input. Ignored if gradients are on, since the backward needs the pre-activation.
        save: What is saved for the backward pass, as in `timm_sugar.sugar`.

    Shape:
        ``(*) -> (*)``, any shape, memory format and real floating-point dtype.

    Raises:
        ValueError: unknown surrogate, or an alpha that it does not take.

    Examples:
        >>> layer = Sugar("bsilu", alpha=2.0)
        >>> layer, layer(torch.randn(8, 64, 7, 7)).shape  # any shape -> the same
        (Sugar(bsilu, alpha=2), torch.Size([8, 64, 7, 7]))
    """

    save: str = "exact"  # for modules pickled before `save` existed

    def __init__(
        self, surrogate: str = "bsilu", alpha: float | None = None, inplace: bool = False, save: str = "exact"
    ):
        super().__init__()
        entry = get_surrogate(surrogate)
        self.surrogate = entry.name
        self.alpha = entry.resolve_alpha(alpha)
        self.inplace = inplace
        check_save(save)
        self.save = save

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.relu(x)
        else:  # the script compiler skips this branch only if it is an else
            return activate(x, self.surrogate, self.alpha, self.save, self.inplace, self.training)

    def __prepare_scriptable__(self) -> nn.Module:  # torch.jit.script calls this and compiles the result
        _warn_of_script()
        return self

    def extra_repr(self) -> str:
        parts = [self.surrogate]
        if self.alpha is not None:
            parts.append(f"alpha={self.alpha:g}")
        if self.inplace:
            parts.append("inplace=True")
        if self.save != "exact":
            parts.append(f"save={self.save}")
        return ", ".join(parts)


@lru_cache
def _warn_of_script() -> None:  # once
    warnings.warn(
        "torch.jit.script compiles SUGAR activations as ReLU, gradient included: train before you script",
        stacklevel=2,
    )


def _alpha_of(surrogate: str, alpha: float | None) -> float:
    resolved = get_surrogate(surrogate).resolve_alpha(alpha)
    assert resolved is not None
    return resolved


@register_notrace_module
class BSiLU(nn.Module):
    """B-SiLU in both passes, ``(x + alpha) * sigmoid(x) - alpha / 2`` (arXiv:2505.22074, eq. 7).

    Args:
        inplace: Accepted because timm passes it, but ignored: the backward needs the pre-activation.
        alpha: Shape parameter; None takes the paper's 1.67.

    Shape:
        ``(*) -> (*)``, any real floating-point dtype.
    """

    def __init__(self, inplace: bool = False, alpha: float | None = None):
        super().__init__()
        self.alpha = _alpha_of("bsilu", alpha)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return bsilu(x, self.alpha)
        else:
            return surrogate_activation(x, "bsilu", self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}"


@register_notrace_module
class NeLU(nn.Module):
    """NeLU in both passes, ``x`` if x > 0, else ``alpha x^2 / (1 + x^2)``: the antiderivative of eq. 9, 0 at 0.

    Args, shape: as `BSiLU`; alpha None takes 0.01.
    """

    def __init__(self, inplace: bool = False, alpha: float | None = None):
        super().__init__()
        self.alpha = _alpha_of("nelu", alpha)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return nelu(x, self.alpha)
        else:
            return surrogate_activation(x, "nelu", self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}"


@dataclass(frozen=True)
class Activation:
    """The activation arguments that every registered model takes: SUGAR with a surrogate, or an act_layer.

    None leaves a field open.

    Attributes:
        surrogate: Surrogate of SUGAR.
        alpha: Shape parameter of the surrogate, or of the activations ``bsilu`` and ``nelu``.
        save: What is saved for the backward pass, as in `timm_sugar.sugar`.
        act_layer: Any activation that timm resolves, by name or class, in place of SUGAR.

    Examples:
        >>> Activation(alpha=0.2).resolve(Activation("nelu", 0.1))
        Activation(surrogate='nelu', alpha=0.2, save='exact', act_layer=None)
        >>> Activation("bsilu").resolve(Activation("nelu", 0.1)).alpha
        1.67
    """

    surrogate: str | None = None
    alpha: float | None = None
    save: str | None = None
    act_layer: LayerType | None = None

    @classmethod
    def pop(cls, arguments: dict[str, Any]) -> "Activation":
        """Remove the activation arguments from those of a model, and return them."""
        return cls(**{name: arguments.pop(name, None) for name in cls.__dataclass_fields__})

    @classmethod
    def of(cls, model: nn.Module) -> "Activation":
        """Return surrogate and alpha of a network's SUGAR activations; all fields are None if it has none.

        Raises:
            ValueError: its activations differ from each other.
        """
        found = {(m.surrogate, m.alpha) for m in model.modules() if isinstance(m, Sugar)}
        if len(found) > 1:
            raise ValueError(f"the network mixes surrogates: {sorted(found, key=str)}")
        return cls(*found.pop()) if found else cls()

    def given(self) -> dict[str, Any]:
        """Return the fields that are not None."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if getattr(self, name) is not None}

    def resolve(self, default: "Activation | None" = None) -> "Activation":
        """Fill in open fields: alpha, save, and the surrogate of a model that has a default one.

        Args:
            default: The model's default surrogate and alpha, or None. This alpha applies to this surrogate only; any
                other surrogate uses its own default.

        Raises:
            ValueError: act_layer together with surrogate, save or an alpha that it does not take; alpha or save
                without any surrogate; or an invalid name or alpha.
        """
        extra = [name for name in self.given() if name != "act_layer"]
        if self.act_layer is not None:
            layer = _find_act_layer(self.act_layer)
            if extra == ["alpha"] and layer in (BSiLU, NeLU):
                return replace(self, alpha=layer(alpha=self.alpha).alpha)
            if extra:
                raise ValueError(f"{' and '.join(extra)} and act_layer contradict each other; give one of them")
            return self
        own = Activation() if default is None or self.surrogate is not None else default
        surrogate = self.surrogate or own.surrogate
        if surrogate is None:
            if extra:
                raise ValueError(f"{' and '.join(extra)} needs a surrogate: this model has none of its own")
            return self
        module = Sugar(surrogate, own.alpha if self.alpha is None else self.alpha, save=self.save or "exact")
        return Activation(module.surrogate, module.alpha, module.save)

    def layer(self) -> Callable[..., nn.Module] | None:
        """Return timm's act_layer for a resolved activation.

        Returns:
            A callable that takes ``inplace``, positionally or by name, and returns a new module; None keeps the
            model's own activation.
        """
        if self.act_layer is not None:
            found = _find_act_layer(self.act_layer)
            return found if self.alpha is None else partial(found, alpha=self.alpha)
        if self.surrogate is None:
            return None
        return partial(_create_sugar, self.surrogate, alpha=self.alpha, save=self.save or "exact")


def _find_act_layer(act_layer: LayerType) -> Callable[..., nn.Module]:
    layer: Any = act_layer
    if isinstance(act_layer, str):
        try:
            layer = create_act.get_act_layer(act_layer)
        except KeyError:
            raise ValueError(unknown_name("activation", act_layer, [*ACT_LAYERS])) from None
    found: Callable[..., nn.Module] = layer
    return found


def register_surrogate(
    name: str, derivative: SurrogateFunction, function: SurrogateFunction | None = None, alpha: float | None = None
) -> None:
    """Add a custom surrogate and register the activation ``sugar_<name>`` with timm.

    Args:
        name: A lower-case identifier that no built-in surrogate has. Registering it again replaces it.
        derivative: ``(x, alpha) -> s'(x)``, elementwise in differentiable torch operations, float32 or float64 in
            and out. It must be a pure function of x and alpha: kernels are generated from it once, so later changes
            to other values that it reads have no effect.
        function: ``(x, alpha) -> s(x)``, needed only for the indirect form of forward gradient injection and for
            `surrogate_activation`.
        alpha: Default shape parameter; None for a surrogate without one, which is then called with ``alpha=None``.

    Raises:
        ValueError: the name or alpha is not valid, or derivative is not callable.

    Examples:
        >>> register_surrogate("triangle", lambda x, alpha: torch.relu(1 - x.abs() / alpha), alpha=2.0)
        >>> x = torch.tensor([-1.0, 0.0], requires_grad=True)
        >>> torch.autograd.grad(sugar(x, "triangle").sum(), x)[0].tolist()
        [0.5, 1.0]
    """
    add_surrogate(Surrogate(name, derivative, function, alpha))
    for register in activation_registries:
        register(name)


def _create_sugar(surrogate: str, inplace: bool = False, alpha: float | None = None, save: str = "exact") -> Sugar:
    return Sugar(surrogate, alpha, inplace, save)


def apply_sugar(surrogate: str, x: Tensor, inplace: bool = False) -> Tensor:
    """`sugar` with the signature of timm's activation functions."""
    return sugar(x, surrogate)


def _register_with_timm(surrogate: str) -> None:
    # timm calls a layer with inplace as the first positional or as a keyword argument, hence not partial(Sugar, ...).
    ACT_LAYERS[f"sugar_{surrogate}"] = partial(_create_sugar, surrogate)
    ACT_FUNCTIONS[f"sugar_{surrogate}"] = partial(apply_sugar, surrogate)


# Other registries of activation names append a function here.
activation_registries: list[Callable[[str], None]] = [_register_with_timm]

for _name in [*list_surrogates(), "swish"]:
    _register_with_timm(_name)
ACT_LAYERS.update(bsilu=BSiLU, nelu=NeLU)
ACT_FUNCTIONS.update({name: partial(surrogate_activation, surrogate=name) for name in ("bsilu", "nelu")})
