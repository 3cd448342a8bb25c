"""The surrogate table: one entry for each surrogate, and the only place to add one.

A surrogate is a smooth function whose derivative replaces the derivative of ReLU in the backward pass. Functions and
derivatives are written with differentiable ATen operations, so that they can be differentiated again, vmapped, compiled
and exported. They receive float32 or float64 and keep the dtype. At +-inf each derivative is its limit, never NaN; at
NaN it is NaN.

Source: Horuz et al., "The Resurrection of the ReLU", arXiv:2505.22074, section 3 and appendix D.
"""

import difflib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SurrogateFunction = Callable[[Tensor, Any], Tensor]  # alpha: a float, or None for a surrogate without one


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A surrogate function and its derivative.

    Attributes:
        name: Name in the registry; the activation is registered with timm as ``sugar_<name>``.
        derivative: ``(x, alpha) -> s'(x)``, elementwise, of the shape and dtype of x.
        function: ``(x, alpha) -> s(x)``, or None where only the derivative is known.
        alpha: Default shape parameter, or None for a surrogate that has none.
        number: Changes when a name is registered again, to distinguish the two surrogates.
    """

    name: str
    derivative: SurrogateFunction
    function: SurrogateFunction | None = None
    alpha: float | None = None
    number: int = field(default_factory=itertools.count().__next__, init=False)

    def resolve_alpha(self, alpha: float | None) -> float | None:
        """Return `alpha`, or the default where it is None.

        Raises:
            ValueError: alpha is not finite, or this surrogate has no alpha.
        """
        if type(alpha) is float and -math.inf < alpha < math.inf and self.alpha is not None:  # fast path
            return alpha
        if alpha is None:
            return self.alpha
        if self.alpha is None:
            raise ValueError(f"surrogate {self.name!r} has no alpha, got alpha={alpha!r}")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < math.inf:
            raise ValueError(f"alpha must be a finite number, got {alpha!r}")
        return float(alpha)


# Beyond these bounds the vanishing factor is exactly 0 in float64 too, so clamping changes no finite value and avoids
# inf * 0 = NaN in the limits. Tensor.clamp propagates NaN.
_EXP_UNDERFLOW = 1024.0
_GAUSS_UNDERFLOW = 64.0
_SATURATION = 48.0  # sigmoid and similar functions round to 1 in float64 from here on

_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946


def bsilu(x: Tensor, alpha: float) -> Tensor:  # eq. 7
    return (x.clamp(min=-1024.0) + alpha) * torch.sigmoid(x) - alpha / 2


def _bsilu_derivative(x: Tensor, alpha: float) -> Tensor:  # eq. 8
    # One exponential, one division, and 1 - sigmoid without cancellation.
    x = x.clamp(-_EXP_UNDERFLOW, _SATURATION)
    e = torch.exp(x)
    complement = 1 / (1 + e)
    s = e * complement
    return s + (x + alpha) * s * complement


def nelu(x: Tensor, alpha: float) -> Tensor:  # antiderivative of eq. 9, continuous, 0 at 0
    square = x.clamp(min=-1e9) ** 2  # beyond, the ratio rounds to 1 in float64 too
    return torch.where(x > 0, x, alpha * (square / (1 + square)))


def _nelu_derivative(x: Tensor, alpha: float) -> Tensor:  # eq. 9
    x = x.clamp(min=-math.sqrt(torch.finfo(x.dtype).max))
    reciprocal = 1 / (1 + x * x)
    return torch.where(x > 0, 1.0, 2 * alpha * (x * reciprocal) * reciprocal)


def _elu_derivative(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, 1.0, alpha * torch.exp(x.clamp(max=0)))


def _selu_derivative(x: Tensor, alpha: None) -> Tensor:
    return _SELU_SCALE * _elu_derivative(x, _SELU_ALPHA)


def _gelu_derivative(x: Tensor, alpha: None) -> Tensor:
    z = x * math.sqrt(0.5)
    density = torch.exp(-(z * z)) * (1 / math.sqrt(2 * math.pi))
    return 0.5 * (1 + torch.erf(z)) + x.clamp(-_GAUSS_UNDERFLOW, _GAUSS_UNDERFLOW) * density


def _silu_derivative(x: Tensor, alpha: None) -> Tensor:
    return _bsilu_derivative(x, 0.0)


def _mish_derivative(x: Tensor, alpha: None) -> Tensor:
    # tanh(softplus(x)) = n / (n + 2) and its derivative 4e(1 + e) / (n + 2)^2, where e = exp(x) and n = e(e + 2)
    x = x.clamp(-_EXP_UNDERFLOW, _SATURATION / 2)
    e = torch.exp(x)
    n = e * (e + 2)
    return n / (n + 2) + (4 * x / (n + 2)) * (e * (1 + e) / (n + 2))


def _leaky_relu_derivative(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, 1.0, torch.where(x <= 0, alpha, x))  # the last branch is NaN


_SURROGATES: dict[str, Surrogate] = {
    s.name: s
    for s in (
        Surrogate("bsilu", _bsilu_derivative, bsilu, alpha=1.67),
        Surrogate("elu", _elu_derivative, lambda x, alpha: F.elu(x, alpha), alpha=1.0),
        Surrogate("gelu", _gelu_derivative, lambda x, alpha: F.gelu(x)),
        Surrogate("leaky_relu", _leaky_relu_derivative, lambda x, alpha: F.leaky_relu(x, alpha), alpha=0.01),
        Surrogate("mish", _mish_derivative, lambda x, alpha: F.mish(x)),
        Surrogate("nelu", _nelu_derivative, nelu, alpha=0.01),
        Surrogate("selu", _selu_derivative, lambda x, alpha: F.selu(x)),
        Surrogate("silu", _silu_derivative, lambda x, alpha: F.silu(x)),
    )
}
BUILT_IN = frozenset(_SURROGATES)
_ALIASES = {"swish": "silu"}


def list_surrogates() -> list[str]:
    """Return the names of all surrogates, sorted. Aliases (``swish``) work but are not listed.

    Examples:
        >>> {"bsilu", "elu", "gelu"} < {*list_surrogates()}
        True
    """
    return sorted(_SURROGATES)


def get_surrogate(name: str) -> Surrogate:
    """Return the surrogate with this name, an entry of `list_surrogates()` or an alias.

    Raises:
        ValueError: unknown name; the message suggests the nearest valid one.

    Examples:
        >>> nelu = get_surrogate("nelu")
        >>> nelu.alpha, nelu.derivative(torch.tensor([-1.0, 2.0]), 0.1).shape
        (0.01, torch.Size([2]))
    """
    if not isinstance(name, str):
        raise ValueError(f"surrogate must be a name, one of {', '.join(list_surrogates())}; got {name!r}")
    if name in _SURROGATES:
        return _SURROGATES[name]
    if name in _ALIASES:
        return _SURROGATES[_ALIASES[name]]
    raise ValueError(unknown_name("surrogate", name, [*_SURROGATES, *_ALIASES]))


def add_surrogate(surrogate: Surrogate) -> None:
    """Add a user's surrogate to the table, replacing an earlier one of that name.

    Raises:
        ValueError: the name is not a lower-case identifier, or belongs to a built-in surrogate or alias.
    """
    name = surrogate.name
    if not (isinstance(name, str) and name.isidentifier() and name == name.lower()):
        raise ValueError(f"a surrogate's name must be a lower-case identifier, got {name!r}")
    if name in BUILT_IN or name in _ALIASES:
        raise ValueError(f"surrogate {name!r} is built in; register yours under another name")
    if not callable(surrogate.derivative) or not (surrogate.function is None or callable(surrogate.function)):
        raise ValueError(f"surrogate {name!r}: derivative and function must be callables that take (x, alpha)")
    Surrogate(name, surrogate.derivative, alpha=0.0).resolve_alpha(surrogate.alpha)
    _SURROGATES[name] = surrogate


def unknown_name(kind: str, name: str, valid: list[str]) -> str:
    """Return a one-line error message for an unknown name: the nearest valid name, or up to 30 valid names."""
    near = difflib.get_close_matches(str(name), valid, n=1)
    hint = (
        f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(sorted(valid)[:30])}{', ...' * (len(valid) > 30)}"
    )
    return f"unknown {kind} {name!r}; {hint}"
