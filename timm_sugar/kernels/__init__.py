"""Kernels for eager mode, where a formula is one pass over memory: exact and lean, for the CPU and for GPUs."""

import torch

from ..surrogates import get_surrogate
from . import cpu, cuda


def gradient_path(
    surrogate: str, save: str = "exact", dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> str:
    """Return how eager mode computes the gradient of a surrogate here, after compiling what it needs.

    Args:
        surrogate: A name of the table.
        save: "exact", "uint8" or "uint4".
        dtype: Of the pre-activation.
        device: Where it is.

    Returns:
        "cpp" (CPU), "jiterator" or "triton" (CUDA and ROCm), or "composed": plain operations, right but slower.
    """
    entry, kind = get_surrogate(surrogate), torch.device(device).type
    if kind == "cpu":
        return "cpp" if cpu.library(entry if save == "exact" else None) is not None else "composed"
    if kind == "cuda" and save == "exact":
        return "jiterator" if cuda.exact(entry, dtype) is not None else "composed"
    return "triton" if kind == "cuda" and cuda.lean() is not None else "composed"
