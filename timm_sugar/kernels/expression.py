"""The derivative of a surrogate as C++, traced from its Python function, so that the formula is written once.

The code defines one constant per operation. It calls ``exp``, ``tanh`` and so on by name: on the CPU these are the
functions of kernels.cpp, in CUDA and HIP their own.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..surrogates import Surrogate

_INFIX = {
    "mul": "*", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
    "logical_and": "&", "logical_or": "|", "bitwise_and": "&", "bitwise_or": "|",
}  # fmt: skip
_FUNCTIONS = ("exp", "expm1", "log", "log1p", "tanh", "erf", "sqrt", "sin", "cos", "atan")
_FORMULAS = {
    **{name: f"{{0}} {symbol} {{1}}" for name, symbol in _INFIX.items()},
    **{name: f"{name}({{0}})" for name in _FUNCTIONS},
    "div": "T({0}) / T({1})",
    "neg": "-{0}",
    "abs": "{0} < 0 ? -{0} : {0}",
    "square": "{0} * {0}",
    "reciprocal": "1 / T({0})",
    "rsqrt": "1 / sqrt({0})",
    "sigmoid": "1 / (1 + exp(-{0}))",
    "cosh": "(exp({0}) + exp(-{0})) / 2",
    "erfc": "1 - erf({0})",
    "relu": "{0} < 0 ? 0 : {0}",
    "sign": "T({0} > 0) - T({0} < 0)",
    "where": "{0} ? {1} : {2}",
    "minimum": "({0} < {1}) | isnan({0}) ? {0} : {1}",
    "maximum": "({0} > {1}) | isnan({0}) ? {0} : {1}",
    "isnan": "isnan({0})",
    "logical_not": "!{0}",
    "bitwise_not": "!{0}",
    "zeros_like": "0",
    "ones_like": "1",
    "full_like": "{1}",
    "clone": "{0}",
    "detach": "{0}",
    "alias": "{0}",
    "_to_copy": "{0}",
}


_LAYOUT = ("dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking", "copy")  # do not affect values


class UnknownOperation(Exception):
    """A derivative uses an operation without a C++ form; the message names it."""

    def __init__(self, name: str):
        super().__init__(f"{name} has no C++ form")


def derivative_source(surrogate: Surrogate, dtype: torch.dtype) -> tuple[str, str]:
    """Return s'(x) in C++, over ``T x`` and ``T alpha``, where T is float or double.

    Args:
        surrogate: The surrogate.
        dtype: The type T, torch.float32 or torch.float64.

    Returns:
        Statements and an expression. For ``alpha * torch.exp(x)`` they are
        ``"const T v0 = exp(x); const T v1 = alpha * v0;"`` and ``"v1"``.

    Raises:
        UnknownOperation: the derivative is not elementwise, or uses an unsupported operation.
    """
    statements: list[str] = []
    with torch.no_grad():
        x, alpha = _Traced("x", statements, dtype, (2,)), _Traced("alpha", statements, dtype, ())
        result = surrogate.derivative(x, None if surrogate.alpha is None else alpha)
    return " ".join(statements), _text(result)


class _Traced(Tensor):
    """Represents a value of the C++ function: each operation on it adds a statement."""

    text: str
    statements: list[str]

    @staticmethod
    def __new__(cls, text: str, statements: list[str], dtype: torch.dtype, shape: tuple[int, ...]) -> "_Traced":
        value: _Traced = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        value.text, value.statements = text, statements
        return value

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> "_Traced":
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        text = _formula(name, args, kwargs)
        traced = [value for value in args if isinstance(value, _Traced)]
        on_meta = [_on_meta(value) if isinstance(value, Tensor) else value for value in args]
        result = func(*on_meta, **{key: value for key, value in kwargs.items() if key != "device"})
        narrower = any(value.is_floating_point() and value.itemsize > result.itemsize for value in traced)
        if result.dtype != torch.bool and (narrower or not result.is_floating_point()):
            raise UnknownOperation(f"{name} with a result of {result.dtype}")
        made = cls(f"v{len(traced[0].statements)}", traced[0].statements, result.dtype, tuple(result.shape))
        made.statements.append(f"const {'bool' if result.dtype == torch.bool else 'T'} {made.text} = {text};")
        return made


def _formula(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    if name in ("add", "sub", "rsub"):
        scale = kwargs.pop("alpha", args[2] if len(args) > 2 else 1)
        args = (args[1], args[0], *args[2:]) if name == "rsub" else args
        scaled = _text(args[1]) if scale == 1 else f"{_text(args[1])} * {_text(scale)}"
        return f"{_text(args[0])} {'+' if name == 'add' else '-'} {scaled}"
    if name in ("clamp", "clamp_min", "clamp_max"):  # keeps NaN
        low, high = {"clamp_min": (args[-1], None), "clamp_max": (None, args[-1])}.get(
            name, (*args[1:], None, None)[:2]
        )
        low, high = kwargs.get("min", low), kwargs.get("max", high)
        text = _text(args[0])
        if low is not None:
            text = f"({text} < {_text(low)} ? {_text(low)} : {text})"
        return text if high is None else f"{text} > {_text(high)} ? {_text(high)} : {text}"
    if name == "pow":
        base, exponent = args
        if isinstance(exponent, (int, float)) and exponent in (1, 2, 3, 4):
            return " * ".join([_text(base)] * int(exponent))
        return f"pow({_text(base)}, {_text(exponent)})"
    formula = _FORMULAS.get(name, "")
    if name == "ne" and args[0] is args[1]:
        formula = _FORMULAS["isnan"]
    surplus = [key for key, value in kwargs.items() if key not in _LAYOUT and value is not None]
    if (
        not formula
        or surplus
        or (len(args) > 1 and f"{{{len(args) - 1}}}" not in formula and name not in ("ne", "full_like"))
    ):
        raise UnknownOperation(f"{name}({', '.join(surplus)})" if surplus else name)
    return formula.format(*map(_text, args))


def _text(value: Any) -> str:
    if isinstance(value, _Traced):
        return value.text
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, (int, float)):
        raise UnknownOperation(f"a constant {type(value).__name__}")
    if not math.isfinite(value):
        raise UnknownOperation(f"the constant {value}")
    return f"T({value!r})"


def _on_meta(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")
