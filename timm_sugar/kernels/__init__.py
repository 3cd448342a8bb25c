"""Fused kernels for eager mode, exact and lean, for the CPU and for GPUs."""

import torch

from ..surrogates import get_surrogate
from . import cpu, cuda


def gradient_path(
    surrogate: str, save: str = "exact", dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> str:
    """Compile the kernel that eager mode needs for a surrogate, and return which one it is.

    Args:
        surrogate: Name of a surrogate.
        save: "exact", "uint8" or "uint4".
        dtype: Dtype of the pre-activation.
        device: Device of the pre-activation.

    Returns:
        "cpp" (CPU), "jiterator" or "triton" (CUDA and ROCm), or "composed": plain operations, correct but slower.
    """
    entry, kind = get_surrogate(surrogate), torch.device(device).type
    if kind == "cpu":
        return "cpp" if cpu.library(entry if save == "exact" else None) is not None else "composed"
    if kind == "cuda" and save == "exact":
        return "jiterator" if cuda.exact(entry, dtype) is not None else "composed"
    return "triton" if kind == "cuda" and cuda.lean() is not None else "composed"
