"""The exact backward: the gradient times the surrogate's derivative, in one pass over memory."""

import torch
from torch import Tensor

from ..surrogates import Surrogate
from . import cpu, cuda
from .memory import as_laid_out, may_read, opmath


def times_derivative(grad: Tensor, x: Tensor, surrogate: Surrogate, alpha: float | None) -> Tensor:
    """Return ``grad * s'(x)``, computed in float32 or float64.

    Args:
        grad: Gradient with respect to the output, same shape as x.
        x: Pre-activation, float16, bfloat16, float32 or float64.
        surrogate: The surrogate.
        alpha: Its shape parameter, or None if it has none.

    Returns:
        The gradient with respect to x, in its shape, dtype and memory format. Differentiable if grad mode is on.
    """
    if may_read(grad, x) and grad.dtype == x.dtype:
        if x.is_cuda:
            kernel = cuda.exact(surrogate, x.dtype)
            if kernel is not None:
                product: Tensor = kernel(x, grad, alpha=alpha or 0.0)
                return product
        elif x.is_cpu and (function := cpu.exact(surrogate, x.dtype)) is not None:
            out = torch.empty_like(x)
            x, grad = as_laid_out(x, out), as_laid_out(grad, out)
            address = (grad.data_ptr(), x.data_ptr(), out.data_ptr())
            function(*address, x.numel(), alpha or 0.0, torch.get_num_threads())
            return out
    return (opmath(grad) * surrogate.derivative(opmath(x), alpha)).to(x.dtype)
