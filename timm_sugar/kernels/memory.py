"""When a kernel may read a tensor's memory, and how that is laid out."""

import torch
from torch import Tensor

from .._torch import dispatch_modes, is_recorded, is_transformed

_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(x: Tensor) -> bool:
    """Whether x is no subclass, and no tracer records the operations on it.

    A mode that only watches makes no difference: checkpointing may run a forward pass again under another mode, and
    has to find the same saved tensors.
    """
    return type(x) in _PLAIN and not torch.jit.is_tracing() and not (dispatch_modes() and is_recorded())


def may_read(*tensors: Tensor) -> bool:
    """Whether a kernel may read the memory of `tensors` here: eager mode, nothing recorded, traced or transformed."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or dispatch_modes() or is_transformed():
        return False
    try:
        for x in tensors:  # sparse tensors and batches of gradients raise; zeros without memory have no address
            if type(x) is not Tensor or x.is_neg() or not x.data_ptr():
                return False
    except RuntimeError:
        return False
    return True


def as_laid_out(x: Tensor, like: Tensor) -> Tensor:
    """Return x with the strides of a dense tensor of its shape: itself, or a copy."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def opmath(x: Tensor) -> Tensor:
    """Return x in the dtype that it is computed in."""
    return x.to(opmath_dtype(x.dtype))


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that `dtype` is computed in: float32 for the 16-bit ones."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
