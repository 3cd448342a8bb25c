"""Triton kernels of lean saving: encode and decode, with one byte or half a byte per element.

lean.py defines the codes. Offsets have 64 bits: a tensor may have more than 2^31 elements. `levels` is
``Levels.encoder`` or ``Levels.table`` in the dtype of the computation. The number of bytes `count` and the start of the
second half `second` are arguments instead of being computed in a kernel, since Triton vectorises loads and stores only
if it knows that both are multiples of 16.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def encode(x: Tensor, y: Tensor, codes: Tensor, levels: Tensor, save: str) -> None:
    """Write relu(x) and the codes of x, for dense tensors of the same strides."""
    _launch(_encode_uint8 if save == "uint8" else _encode_uint4, x, y, codes, levels)


def decode(grad: Tensor, out: Tensor, codes: Tensor, levels: Tensor, save: str) -> None:
    """Write grad times the decoded values of the codes, for dense tensors of the same strides."""
    _launch(_decode_uint8 if save == "uint8" else _decode_uint4, grad, out, codes, levels)


_compiled: dict[Any, Any] = {}


def _launch(kernel: "triton.JITFunction", source: Tensor, target: Tensor, codes: Tensor, levels: Tensor) -> None:
    arguments = (source, target, codes, levels, codes.numel(), source.numel() // 2)
    grid = (triton.cdiv(codes.numel(), _BLOCK), 1, 1)
    if source.is_cuda and source.device.index != torch.cuda.current_device():
        with torch.cuda.device_of(source):
            kernel[grid](*arguments, _BLOCK)
        return
    key = kernel, source.dtype, source.device
    if not _is_usual(*arguments):
        kernel[grid](*arguments, _BLOCK)
    elif key in _compiled:
        _compiled[key][grid](*arguments, _BLOCK)
    elif (made := kernel[grid](*arguments, _BLOCK)) is not None:  # Triton's interpreter returns None
        _compiled[key] = made


def _is_usual(source: Tensor, target: Tensor, codes: Tensor, levels: Tensor, count: int, second: int) -> bool:
    """Whether Triton uses the same compiled kernel for all such arguments of a dtype, so that it can be cached here.

    This holds if pointers and integers are multiples of 16, and integers are not 1 and fit into 32 bits. ROCm has more
    conditions. The cache is needed since Triton's lookup of the kernel takes longer than the launch.
    """
    if not source.is_cuda or torch.version.hip or not 0 < count < 1 << 30 or not second:
        return False
    pointers = source.data_ptr() | target.data_ptr() | codes.data_ptr() | levels.data_ptr()
    return (pointers | count | second) % 16 == 0


@triton.jit
def _offsets(BLOCK: tl.constexpr):
    return tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _number(x, levels):
    # same as _number in lean.py; NaN gives 0
    lowest, highest, outer = tl.load(levels), tl.load(levels + 1), tl.load(levels + 2)
    below, above, inner = tl.load(levels + 3), tl.load(levels + 4), tl.load(levels + 5)
    offset, zero = tl.load(levels + 6).to(tl.int32), tl.load(levels + 7).to(tl.int32)
    within = tl.where(x > lowest, x, lowest)
    within = tl.where(within < highest, within, highest)
    near = tl.where(x > below, x, below)
    near = tl.where(near < above, near, above)
    code = (within * outer + near * inner).to(tl.int32) + tl.where(x < 0, offset - 1, offset)
    return tl.where(x == x, tl.where(x == 0, zero, code), 0)


@triton.jit
def _encode_part(x_ptr, y_ptr, levels, offsets, mask):
    stored = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    x = stored.to(levels.dtype.element_ty)
    tl.store(y_ptr + offsets, tl.where(x < 0, 0.0, stored).to(stored.dtype), mask=mask)
    return _number(x, levels)


@triton.jit
def _decode_part(grad_ptr, out_ptr, levels, codes, offsets, mask):
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    factor = tl.load(levels + codes)
    tl.store(out_ptr + offsets, (grad.to(factor.dtype) * factor).to(grad.dtype), mask=mask)


@triton.jit
def _encode_uint8(x_ptr, y_ptr, codes_ptr, levels, count, second, BLOCK: tl.constexpr):
    offsets = _offsets(BLOCK)
    mask = offsets < count
    code = _encode_part(x_ptr, y_ptr, levels, offsets, mask)
    tl.store(codes_ptr + offsets, code.to(tl.uint8), mask=mask)


@triton.jit
def _decode_uint8(grad_ptr, out_ptr, codes_ptr, levels, count, second, BLOCK: tl.constexpr):
    offsets = _offsets(BLOCK)
    mask = offsets < count
    codes = tl.load(codes_ptr + offsets, mask=mask, other=0).to(tl.int32)
    _decode_part(grad_ptr, out_ptr, levels, codes, offsets, mask)


@triton.jit
def _encode_uint4(x_ptr, y_ptr, codes_ptr, levels, count, second, BLOCK: tl.constexpr):
    offsets = _offsets(BLOCK)
    mask = offsets < count
    low = _encode_part(x_ptr, y_ptr, levels, offsets, mask)
    high = _encode_part(x_ptr, y_ptr, levels, offsets + second, mask)
    tl.store(codes_ptr + offsets, (low + 16 * high).to(tl.uint8), mask=mask)


@triton.jit
def _decode_uint4(grad_ptr, out_ptr, codes_ptr, levels, count, second, BLOCK: tl.constexpr):
    offsets = _offsets(BLOCK)
    mask = offsets < count
    codes = tl.load(codes_ptr + offsets, mask=mask, other=0).to(tl.int32)
    _decode_part(grad_ptr, out_ptr, levels, codes & 15, offsets, mask)
    _decode_part(grad_ptr, out_ptr, levels, codes >> 4, offsets + second, mask)
