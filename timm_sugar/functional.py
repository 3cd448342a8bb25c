"""SUGAR as functions: ReLU forward with the derivative of a surrogate backward, and forward gradient injection.

Source: Horuz et al., "The Resurrection of the ReLU", arXiv:2505.22074, equations 1 to 6.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .kernels.compiled import is_transformed, opmath
from .kernels.exact import times_derivative
from .kernels.lean import Code, Levels, encode, levels_of, times_decoded
from .surrogates import Surrogate, get_surrogate, unknown_name

SAVE_MODES = ("exact", "uint8", "uint4")


def sugar(x: Tensor, surrogate: str = "bsilu", alpha: float | None = None, save: str = "exact") -> Tensor:
    """ReLU whose gradient is the derivative of a smooth surrogate (eq. 4 to 6).

    With gradients off, and in export, ONNX and tracing, this is exactly `torch.relu`.

    Args:
        x: Pre-activation of any shape and memory format, float16, bfloat16, float32 or float64. The derivative of a
            16-bit tensor is computed in float32.
        surrogate: A name of `list_surrogates()` or an alias.
        alpha: Shape parameter of the surrogate; None takes its default.
        save: What is kept for the backward: "exact", the pre-activation itself; "uint8" or "uint4", a code for it of
            one byte or half a byte an element, which needs a bounded derivative and forbids differentiating twice.
            `torch.func` transforms and forward-mode differentiation are exact in every mode.

    Returns:
        ``relu(x)``, of the shape, dtype and memory format of x; its gradient with respect to x is
        ``surrogate'(x)``. It can be differentiated again: the second derivative is that of the surrogate. Where a
        compiler is installed, the gradient comes from a kernel that is compiled at the first backward (a few seconds,
        once for each surrogate and dtype) and kept in Inductor's cache.

    Raises:
        TypeError: x is not a tensor of real floating-point numbers.
        ValueError: no such surrogate or save mode, an alpha that it does not take, or a derivative without bounds
            where the save mode needs them.
    """
    if has_torch_function_unary(x):
        overridden: Tensor = handle_torch_function(sugar, (x,), x, surrogate, alpha, save)
        return overridden
    entry = get_surrogate(surrogate)
    alpha = entry.resolve_alpha(alpha)
    check_save(save)
    _check_dtype(x)
    if not torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_exporting():
        return torch.relu(x)
    if save == "exact" or not x.requires_grad or (not torch.compiler.is_compiling() and is_transformed()):
        return _inject(x, torch.relu, entry, alpha)
    y: Tensor = _LeanInjection.apply(x, save, levels_of(entry.name, f"{alpha}", save))[0]
    return y


def surrogate_activation(x: Tensor, surrogate: str = "bsilu", alpha: float | None = None) -> Tensor:
    """The surrogate's own function in both passes, the "non-SUGAR" baselines of tables 4 and 5.

    Shapes, dtypes and errors are those of `sugar`; a surrogate registered without a function is a ValueError.
    """
    if has_torch_function_unary(x):
        overridden: Tensor = handle_torch_function(surrogate_activation, (x,), x, surrogate, alpha)
        return overridden
    entry = get_surrogate(surrogate)
    alpha = entry.resolve_alpha(alpha)
    _check_dtype(x)

    def forward(x: Tensor) -> Tensor:
        return _function_of(entry)(opmath(x), alpha).to(x.dtype)

    if not torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_exporting():
        return forward(x)
    return _inject(x, forward, entry, alpha)


def forward_gradient_injection(
    x: Tensor, forward: Callable[[Tensor], Tensor], surrogate: Callable[[Tensor], Tensor] | str
) -> Tensor:
    """Forward gradient injection, ``y = g(x) - sg(g(x)) + sg(f(x))`` (eq. 1; sg is the stop-gradient, detach).

    The executable definition that every faster path is tested against, and a tool for any pair of functions: with
    ``(torch.relu, F.leaky_relu)`` it is ProxyGrad (Linse et al., 2024).

    Args:
        x: Real floating-point tensor of any shape.
        forward: f, gives the value; its gradient is bypassed.
        surrogate: g, gives the gradient; a callable, or a surrogate's name for its function at the default alpha.

    Returns:
        ``f(x)`` with the gradient of g. Where g(x) is not finite, so is the result: use `sugar` there.
    """
    _check_dtype(x)
    if isinstance(surrogate, str):
        entry = get_surrogate(surrogate)
        g = _function_of(entry)(x, entry.alpha)
    else:
        g = surrogate(x)
    return g - g.detach() + forward(x).detach()


def _inject(x: Tensor, forward: Callable[[Tensor], Tensor], surrogate: Surrogate, alpha: float | None) -> Tensor:
    # torch.compile refuses an autograd.Function with a jvp of its own, and setup_context, which torch.func needs, costs
    # more than five times as long as ReLU itself on a small tensor.
    transformed = not torch.compiler.is_compiling() and is_transformed()
    function = _TransformableInjection if transformed else _Injection
    y: Tensor = function.apply(x, forward, surrogate, alpha)
    return y


class _Injection(torch.autograd.Function):
    """``forward(x)`` with the gradient ``surrogate.derivative(x)``; saves x and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], surrogate: Surrogate, alpha: float | None
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.surrogate, ctx.alpha = surrogate, alpha
        return forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return times_derivative(grad, x, ctx.surrogate, ctx.alpha), None, None, None


class _TransformableInjection(torch.autograd.Function):
    """The same for `torch.func`: with a rule for vmap, and forward-mode differentiation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, forward: Callable[[Tensor], Tensor], surrogate: Surrogate, alpha: float | None) -> Tensor:
        return forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.surrogate, ctx.alpha = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    backward = _Injection.backward

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (x,) = ctx.saved_tensors
        return times_derivative(tangent, x, ctx.surrogate, ctx.alpha)


class _LeanInjection(torch.autograd.Function):
    """``relu(x)`` that saves a code of x, of one byte or half a byte an element.

    The second output is empty. It ties the gradient to the graph, so that differentiating twice meets a clear error
    and not a constant.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, save: str, levels: Levels) -> tuple[Tensor, Tensor]:
        y, code = encode(x, save, levels)
        tie = x.new_empty(0)
        ctx.save_for_backward(code.codes, tie)
        ctx.save, ctx.levels, ctx.strides = code[1:]
        return y, tie

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        codes, tie = ctx.saved_tensors
        code = Code(codes, ctx.save, ctx.levels, ctx.strides)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _LeanGradient.apply(grad, tie, code), None, None
        return times_decoded(grad, code), None, None


class _LeanGradient(torch.autograd.Function):
    """The gradient out of a code, which cannot be differentiated with respect to the pre-activation."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, tie: Tensor, code: Code) -> Tensor:
        ctx.save = code.save
        return times_decoded(grad, code)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f"save={ctx.save!r} keeps no pre-activation to differentiate twice; use save='exact'")


def check_save(save: str) -> None:
    """Raise ValueError where `save` is not a way to keep the pre-activation."""
    if save not in SAVE_MODES:
        raise ValueError(unknown_name("save mode", save, [*SAVE_MODES]))


def _function_of(surrogate: Surrogate) -> Callable[[Tensor, float | None], Tensor]:
    if surrogate.function is None:
        raise ValueError(f"surrogate {surrogate.name!r} was registered without a function, only with a derivative")
    return surrogate.function


def _check_dtype(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"expected a real floating-point tensor, got {x.dtype}")
