"""SUGAR as functions: ReLU forward with the derivative of a surrogate backward, and forward gradient injection.

Dispatch:

================================  ==============================================================================
context                           path
================================  ==============================================================================
gradients off                     ``relu``
plain tensors, eager              an `autograd.Function` whose backward is a kernel
under a `torch.func` transform    an `autograd.Function` with a vmap rule and forward-mode differentiation
compiled                          the same Functions, opaque to Dynamo (`allow_in_graph`), since Dynamo drops the
                                  backward of a Function that it traces into; AOTAutograd traces them
exported or traced                in train() the composed formula, plain operations that any tracer differentiates;
                                  in eval() ``relu``
DTensor, nested, fake tensors,    the composed formula: a kernel cannot read their memory
any dispatch mode
`fx`                              one call of `activate`, dispatched when the graph runs
================================  ==============================================================================

Inside Dynamo `is_exporting` is not used: before torch 2.12 it returns True during any compilation.

Source: Horuz et al., "The Resurrection of the ReLU", arXiv:2505.22074, equations 1 to 6.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from ._torch import is_trace_check, is_transformed
from .kernels.exact import times_derivative
from .kernels.lean import Code, Levels, encode, levels_of, times_decoded
from .kernels.memory import is_plain, opmath
from .surrogates import Surrogate, get_surrogate, unknown_name

SAVE_MODES = ("exact", "uint8", "uint4")


def sugar(x: Tensor, surrogate: str = "bsilu", alpha: float | None = None, save: str = "exact") -> Tensor:
    """ReLU whose gradient is the derivative of a smooth surrogate (eq. 4 to 6).

    With gradients off this is exactly `torch.relu`.

    Args:
        x: Pre-activation of any shape and memory format, float16, bfloat16, float32 or float64. The derivative of a
            16-bit tensor is computed in float32.
        surrogate: A name of `list_surrogates()` or an alias.
        alpha: Shape parameter of the surrogate; None takes its default.
        save: What is saved for the backward pass: "exact", the pre-activation itself; "uint8" or "uint4", a code of
            one byte or half a byte per element. The codes need a bounded derivative and do not support double
            backward. `torch.func` transforms, forward-mode differentiation, export and tensor subclasses always use
            "exact".

    Returns:
        ``relu(x)``, with the shape, dtype and memory format of x; its gradient with respect to x is
        ``surrogate'(x)``. Double backward is supported: the second derivative is that of the surrogate. If a
        compiler is installed, the gradient comes from a kernel that is compiled at the first backward (about a second,
        once per surrogate) and cached.

    Raises:
        TypeError: x is not a tensor of real floating-point numbers.
        ValueError: unknown surrogate or save mode, an alpha that the surrogate does not take, or an unbounded
            derivative with save mode "uint8" or "uint4".

    Examples:
        >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
        >>> y = sugar(x, "nelu", alpha=0.1)  # (2,) -> (2,)
        >>> y.tolist(), torch.autograd.grad(y.sum(), x)[0].tolist()
        ([0.0, 2.0], [-0.05000000074505806, 1.0])
    """
    return activate(x, surrogate, alpha, save)


def activate(
    x: Tensor, surrogate: str, alpha: float | None, save: str, inplace: bool = False, training: bool = True
) -> Tensor:
    """`sugar` with the additional options of the module.

    Args:
        x, surrogate, alpha, save: As `sugar`.
        inplace: Overwrite x if gradients are off.
        training: Whether export and tracing keep the surrogate gradient; if False, they record ``relu``.
    """
    if has_torch_function_unary(x):
        training = training or isinstance(x, torch.fx.Proxy)  # a graph traced in eval() may be trained later
        overridden: Tensor = handle_torch_function(activate, (x,), x, surrogate, alpha, save, inplace, training)
        return overridden
    entry = get_surrogate(surrogate)
    alpha = entry.resolve_alpha(alpha)
    if save not in SAVE_MODES:
        check_save(save)
    _check_dtype(x)
    compiling = torch.compiler.is_compiling()
    if not torch.is_grad_enabled() and not is_trace_check() and (compiling or not is_transformed()):
        return _relu(x, inplace)  # forward-mode differentiation works with gradients off too
    if compiling:
        graph: Tensor = _in_graph(x, entry.name, entry.number, alpha, save, training)
        return graph
    if _reference is not None:
        return _reference(x, entry, alpha)
    if is_plain(x) or is_transformed():
        return _differentiable(x, entry, alpha, save)
    return _traceable(x, entry, alpha, training)


@torch.compiler.allow_in_graph
def _in_graph(x: Tensor, surrogate: str, number: int, alpha: float | None, save: str, training: bool) -> Tensor:
    # Called by AOTAutograd, by backends that run the graph directly, and by export; Dynamo does not trace into it.
    # `number` changes when a surrogate is registered again, so that Dynamo recompiles.
    if torch.compiler.is_exporting():
        return _traceable(x, get_surrogate(surrogate), alpha, training)
    return _differentiable(x, get_surrogate(surrogate), alpha, save)


def _differentiable(x: Tensor, surrogate: Surrogate, alpha: float | None, save: str) -> Tensor:
    if is_transformed():  # only if needed: its setup_context takes five times as long as ReLU on a small tensor
        y: Tensor = _TransformableInjection.apply(x, surrogate, alpha)
    elif save == "exact" or not x.requires_grad:
        y = _Injection.apply(x, surrogate, alpha)
    else:
        y = _LeanInjection.apply(x, save, levels_of(surrogate, alpha and float(alpha), save))[0]
    return y


def _traceable(x: Tensor, surrogate: Surrogate, alpha: float | None, training: bool) -> Tensor:
    exported = torch.jit.is_tracing() or torch.compiler.is_exporting()
    return _relu(x) if exported and not training else composed(x, surrogate, alpha)


def _relu(x: Tensor, inplace: bool = False) -> Tensor:
    # One call site: torch.jit.trace compares the source lines of two traces.
    return torch.relu_(x) if inplace else torch.relu(x)


def composed(x: Tensor, surrogate: Surrogate, alpha: float | None) -> Tensor:
    """ReLU with the surrogate's first and second derivative, composed of operations that any tracer differentiates.

    ``relu(x)`` plus ``s'(x)`` times a difference with value 0 and derivative 1. Half of ``s'(x)`` is detached, since
    the product rule counts it twice in the second derivative. For x that is not finite the difference would be NaN: it
    is then a constant 0, and so is the gradient at +-inf.

    Args, returns: as `sugar`, with a `Surrogate`.
    """
    derivative = surrogate.derivative(opmath(x), alpha)
    if not isinstance(derivative, Tensor):  # a constant
        derivative = torch.full_like(opmath(x), derivative)
    difference = torch.where(x.isfinite(), x - x.detach(), 0.0)
    y = torch.relu(x).detach() + difference * ((derivative + derivative.detach()) / 2)
    return y.to(x.dtype)


_reference: Callable[[Tensor, Surrogate, float | None], Tensor] | None = None


@contextmanager
def computed_by(reference: Callable[[Tensor, Surrogate, float | None], Tensor]) -> Iterator[None]:
    """Compute every SUGAR activation that runs eagerly in this context by `reference`, for comparison."""
    global _reference
    _reference = reference
    try:
        yield
    finally:
        _reference = None


def surrogate_activation(x: Tensor, surrogate: str = "bsilu", alpha: float | None = None) -> Tensor:
    """The surrogate's own function in both passes, the "non-SUGAR" baselines of tables 4 and 5.

    In eager mode it saves only x and its backward is a kernel; otherwise it consists of plain operations.
    Shapes, dtypes and errors are those of `sugar`; ValueError if the surrogate was registered without a function.
    """
    if has_torch_function_unary(x):
        overridden: Tensor = handle_torch_function(surrogate_activation, (x,), x, surrogate, alpha)
        return overridden
    entry = get_surrogate(surrogate)
    alpha = entry.resolve_alpha(alpha)
    _check_dtype(x)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed() or not is_plain(x):
        return _function_of(entry)(opmath(x), alpha).to(x.dtype)
    y: Tensor = _Function.apply(x, entry, alpha)
    return y


def forward_gradient_injection(
    x: Tensor, forward: Callable[[Tensor], Tensor], surrogate: Callable[[Tensor], Tensor] | str
) -> Tensor:
    """Forward gradient injection, ``y = g(x) - sg(g(x)) + sg(f(x))`` (eq. 1; sg is the stop-gradient, detach).

    This is the reference that every faster path is tested against. It works for any pair of functions: with
    ``(torch.relu, F.leaky_relu)`` it is ProxyGrad (Linse et al., 2024).

    Args:
        x: Real floating-point tensor of any shape.
        forward: f, computes the value; its gradient is not used.
        surrogate: g, provides the gradient; a callable, or the name of a surrogate (with its default alpha).

    Returns:
        ``f(x)`` with the gradient of g. The result is not finite where g(x) is not; `sugar` handles these inputs.

    Examples:
        >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
        >>> y = forward_gradient_injection(x, torch.relu, torch.nn.functional.leaky_relu)  # (2,) -> (2,)
        >>> y.tolist(), torch.autograd.grad(y.sum(), x)[0].tolist()
        ([0.0, 2.0], [0.009999999776482582, 1.0])
    """
    _check_dtype(x)
    if isinstance(surrogate, str):
        entry = get_surrogate(surrogate)
        g = _function_of(entry)(x, entry.alpha)
    else:
        g = surrogate(x)
    return g - g.detach() + forward(x).detach()


class _Injection(torch.autograd.Function):
    """``relu(x)`` with the gradient ``surrogate.derivative(x)``; saves only x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: Surrogate, alpha: float | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.surrogate, ctx.alpha = surrogate, alpha
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return times_derivative(grad, x, ctx.surrogate, ctx.alpha), None, None


class _Function(_Injection):
    """The surrogate's own function with its derivative as gradient; saves only x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: Surrogate, alpha: float | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.surrogate, ctx.alpha = surrogate, alpha
        return _function_of(surrogate)(opmath(x), alpha).to(x.dtype)


class _TransformableInjection(torch.autograd.Function):
    """`_Injection` for `torch.func`: with a vmap rule and forward-mode differentiation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, surrogate: Surrogate, alpha: float | None) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.surrogate, ctx.alpha = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    backward = _Injection.backward

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (x,) = ctx.saved_tensors
        return times_derivative(tangent, x, ctx.surrogate, ctx.alpha)


class _LeanInjection(torch.autograd.Function):
    """``relu(x)`` that saves a code of x, one byte or half a byte per element.

    The second output is empty. It connects the gradient to the graph, so that a double backward raises a clear error
    instead of treating the gradient as a constant.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, save: str, levels: Levels) -> tuple[Tensor, Tensor]:
        y, code = encode(x, save, levels)
        tie = x.new_empty(0)
        ctx.save_for_backward(code.codes, tie)
        ctx.save, ctx.levels, ctx.strides = code[1:]
        ctx.set_materialize_grads(False)  # no zero gradient for the tie
        return y, tie

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None
        codes, tie = ctx.saved_tensors
        code = Code(codes, ctx.save, ctx.levels, ctx.strides)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _LeanGradient.apply(grad, tie, code), None, None
        return times_decoded(grad, code), None, None


class _LeanGradient(torch.autograd.Function):
    """The gradient computed from a code; it cannot be differentiated with respect to the pre-activation."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, tie: Tensor, code: Code) -> Tensor:
        ctx.save = code.save
        return times_decoded(grad, code)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f"save={ctx.save!r} keeps no pre-activation to differentiate twice; use save='exact'")


def check_save(save: str) -> None:
    """Raise ValueError if `save` is not a valid mode."""
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
