"""When a kernel may read a tensor's memory, and how that is laid out."""

import torch
from torch import Tensor

from .._torch import is_dispatched, is_transformed


def may_read(*tensors: Tensor) -> bool:
    """Whether a kernel may read the memory of `tensors` here: eager mode, nothing recorded, traced or transformed."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_dispatched() or is_transformed():
        return False
    for x in tensors:
        if type(x) is not Tensor or x.layout is not torch.strided or not (x.is_cpu or x.is_cuda):
            return False
        if x.is_neg() or x.numel() == 0:
            return False
        try:
            if x.data_ptr() == 0:  # zeros that have no memory
                return False
        except RuntimeError:  # a batch of gradients
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
