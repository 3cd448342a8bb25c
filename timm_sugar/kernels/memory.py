"""Whether a kernel may read a tensor's memory, and its memory layout."""

import torch
from torch import Tensor

from .._torch import dispatch_modes, is_recorded, is_transformed

_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(x: Tensor) -> bool:
    """Whether x is not of a tensor subclass, and no tracer records the operations on it.

    Dispatch modes that only observe do not count: checkpointing may recompute a forward pass under another mode, and
    must get the same saved tensors.
    """
    return type(x) in _PLAIN and not torch.jit.is_tracing() and not (dispatch_modes() and is_recorded())


def may_read(*tensors: Tensor) -> bool:
    """Whether a kernel may read the memory of `tensors`: eager mode, nothing recorded, traced or transformed."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or dispatch_modes() or is_transformed():
        return False
    try:
        for x in tensors:  # sparse and batched tensors raise; zero tensors without storage have no address
            if type(x) is not Tensor or x.is_neg() or not x.data_ptr():
                return False
    except RuntimeError:
        return False
    return True


def as_laid_out(x: Tensor, like: Tensor) -> Tensor:
    """Return x, or a copy, with the strides of `like`, a dense tensor of the same shape."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def opmath(x: Tensor) -> Tensor:
    """Return x in its compute dtype."""
    return x.to(opmath_dtype(x.dtype))


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the compute dtype of `dtype`: float32 for 16-bit types."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
