"""Kernels for CUDA and ROCm: exact ones by torch's jiterator, lean ones in Triton."""

import importlib
import threading
from functools import lru_cache
from typing import Any

import torch

from .._torch import jiterator
from ..surrogates import Surrogate
from .cpu import tell_why_not
from .expression import derivative_source

_lock = threading.Lock()
_kernels: dict[tuple[Surrogate, bool], Any] = {}


def exact(surrogate: Surrogate, dtype: torch.dtype) -> Any:
    """Return a function of x, the gradient and ``alpha=``; None without a jiterator or a C++ form.

    It supports any strides, broadcasting, and tensors of more than 2^31 elements. torch compiles it at the first call
    for each dtype.
    """
    key = surrogate, dtype is torch.float64
    try:
        return _kernels[key]
    except KeyError:
        pass
    with _lock:
        if key not in _kernels:
            try:
                _kernels[key] = jiterator(exact_source(surrogate, dtype))
                if _kernels[key] is None:
                    raise NotImplementedError("this version of torch has no jiterator")
            except Exception as error:
                _kernels[key] = None
                tell_why_not(f"the derivative of {surrogate.name}", error)
    return _kernels[key]


def exact_source(surrogate: Surrogate, dtype: torch.dtype) -> str:
    """Return the C++ code of the elementwise kernel, for all dtypes with the same compute dtype as `dtype`."""
    computed = "double" if dtype == torch.float64 else "float"
    statements, result = derivative_source(surrogate, torch.float64 if computed == "double" else torch.float32)
    return (
        f"template <typename S> S sugar_{surrogate.name}_{computed}(S input, S grad, {computed} alpha) "
        f"{{ typedef {computed} T; const T x = input; {statements} return static_cast<S>(T(grad) * ({result})); }}"
    )


@lru_cache
def lean() -> Any:
    """Return the module of Triton kernels, or None without Triton."""
    try:
        return importlib.import_module("timm_sugar.kernels.lean_triton")
    except ImportError as error:
        tell_why_not("lean saving", error)
        return None
