"""Lean saving: the backward pass keeps a code of one byte or half a byte per element instead of the pre-activation.

Every code is an interval of x and represents the surrogate's derivative at its midpoint. The intervals are fitted to
the surrogate: narrow where its derivative bends, and wider by a factor on either side. The outermost are open. 0 has
its own code and no interval crosses it, so that a step of the derivative at 0 and its sign are preserved. Code 0 means
NaN and the largest code 0.0; the codes in between number the intervals in ascending order. The derivative is looked up
in a table, so the error comes from the few entries and not from the arithmetic. Few-bit backward passes: Novikov et
al., arXiv:2202.00441.

Two codes of half a byte share a byte: one from the first half of the flattened tensor and one from the second, so that
loads stay contiguous; if the number of elements is odd, both hold the middle one. The CPU kernels are in kernels.cpp,
the GPU kernels in lean_triton.py.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import Array, c_double
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..surrogates import Surrogate
from . import cpu, cuda
from .memory import as_laid_out, may_read, opmath, opmath_dtype


class Grid(NamedTuple):
    """Intervals of x, in units of `step`; negative values are below 0."""

    step: Tensor  # width of the narrow intervals
    negative: Tensor  # number of intervals below 0; an integer
    below: Tensor  # the narrow ones reach from -below * step ...
    above: Tensor  # ... to above * step; these need not be interval boundaries
    coarse: Tensor  # width, in steps, of the intervals below and above them


@dataclass(frozen=True, eq=False)
class Levels:
    """Parameters of the encoder and the decoder.

    Attributes:
        encoder: Arguments of `_number`.
        table: The derivative that each code represents.
        kept: Cache of both in the forms that kernels take.
    """

    encoder: tuple[float, ...]
    table: tuple[float, ...]
    kept: dict[Any, Any] = field(default_factory=dict)

    def as_doubles(self, name: str) -> Array[c_double]:
        """Return `encoder` or `table` as a C array."""
        if name not in self.kept:
            values = getattr(self, name)
            self.kept[name] = (c_double * len(values))(*values)
        return self.kept[name]  # type: ignore[no-any-return]

    def as_tensor(self, name: str, like: Tensor) -> Tensor:
        """Return `encoder` or `table` in the compute dtype of `like` and on its device."""
        key = name, like.dtype, like.device
        if key not in self.kept:
            self.kept[key] = torch.tensor(getattr(self, name), dtype=opmath_dtype(like.dtype), device=like.device)
        return self.kept[key]  # type: ignore[no-any-return]


class Code(NamedTuple):
    """Encoded pre-activations, and the parameters to decode them."""

    codes: Tensor  # uint8, one byte or half a byte per element
    save: str
    levels: Levels
    strides: tuple[int, ...] | None  # of the dense tensor whose memory was encoded; None where its elements were


_CODES = {"uint8": 256, "uint4": 16}


@lru_cache(maxsize=256)
def levels_of(surrogate: Surrogate, alpha: float | None, save: str) -> Levels:
    """Fit the levels to a surrogate; takes a quarter of a second, and is cached.

    Args:
        surrogate: The surrogate.
        alpha: Its shape parameter, or None.
        save: "uint8" or "uint4".

    Raises:
        ValueError: the derivative is not bounded.
    """
    # In a separate thread, so that no tracer or transform of the caller sees the tensors.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_levels, surrogate, alpha, save).result()


def _levels(surrogate: Surrogate, alpha: float | None, save: str) -> Levels:
    def derivative(x: Tensor) -> Tensor:
        found = surrogate.derivative(x, alpha)
        return torch.where(found.isnan(), 0.0, found)

    with torch.inference_mode():
        if not _is_bounded(derivative):
            raise ValueError(
                f"save={save!r} needs a surrogate whose derivative is bounded, which that of {surrogate.name!r} is "
                "not; use save='exact'"
            )
        codes = _CODES[save]
        grid = _fit(derivative, codes - 2)
        encoder = tuple(float(value) for value in _encoder(grid, codes))
        at_zero = derivative(torch.zeros((), dtype=torch.float64)).item()
        middles = _middle(torch.arange(1, codes - 1, dtype=torch.float64), *_decoder(grid))
        table = (math.nan, *derivative(middles).tolist(), at_zero)
        return Levels(encoder, table)


def _is_bounded(derivative: Callable[[Tensor], Tensor]) -> bool:
    magnitudes = torch.cat([torch.arange(0, 50, 1e-3, dtype=torch.float64), torch.logspace(1.7, 30, 1_000).double()])
    found = derivative(torch.cat([-magnitudes, magnitudes])).abs().view(2, -1)
    return bool(found.max() <= 4 * found[:, magnitudes <= 1e3].max())


def _fit(derivative: Callable[[Tensor], Tensor], intervals: int) -> Grid:
    """Search for the grid with the least squared error of the derivative, relative to its square.

    The error is that for inputs from N(0, 1), plus a fraction of that for inputs from N(0, 9). The fraction is smaller
    for 4-bit codes, which have too few intervals for unlikely inputs.
    """
    normal = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400)
    x = torch.stack([normal, 3 * normal])
    exact = derivative(x)
    weights = torch.tensor([1.0, 0.3 if intervals == 14 else 1.0]).double() / exact.square().sum(1).clamp(min=1e-30)

    def errors(grids: Tensor) -> Tensor:
        columns = Grid(*grids.T[:, :, None, None])
        found = derivative(_middle(_number(x, *_encoder(columns, intervals + 2)), *_decoder(columns)))
        return ((found - exact).square().sum(2) * weights).sum(1)

    many = intervals / 14  # number of intervals, relative to a 4-bit code
    starts = [
        (step / many, negative, 0.8 * negative, 0.6 * (intervals - negative), 4.0)
        for step in torch.logspace(-6, 2, 17, base=2).tolist()
        for negative in (round(many * i) for i in range(3, 12))
    ]
    grids = torch.tensor(starts, dtype=torch.float64)
    grids = grids[errors(grids).topk(3, largest=False).indices]
    factor = torch.full((len(grids), 1), 1.3, dtype=torch.float64)
    shift = torch.zeros(5, dtype=torch.float64)
    shift[1] = round(many)
    for _ in range(25):  # coordinate search: one value up or down; a smaller factor if nothing improves
        scaled = [torch.where(torch.arange(5) == i, factor**sign, 1.0) for i in (0, 2, 3, 4) for sign in (1, -1)]
        tried = torch.stack([grids, *(grids * scale for scale in scaled), grids + shift, grids - shift])
        tried[..., 1].clamp_(1, intervals - 1)
        tried[..., 4].clamp_(min=1.0)
        best = errors(tried.flatten(0, 1)).view(tried.shape[:2]).argmin(0)
        grids = tried[best, torch.arange(len(grids))]
        factor = torch.where(best[:, None] == 0, factor.sqrt(), factor)
    return Grid(*grids[errors(grids).argmin()])


def _encoder(grid: Grid, codes: int) -> tuple[Any, ...]:
    """Return the other arguments of `_number`. x is clamped to the outermost midpoints, so these intervals are open."""
    lowest, highest = (_middle(torch.full_like(grid.step, code), *_decoder(grid)) for code in (1, codes - 2))
    below, above = torch.maximum(-grid.below * grid.step, lowest), torch.minimum(grid.above * grid.step, highest)
    outer = 1 / (grid.coarse * grid.step)
    return lowest, highest, outer, below, above, 1 / grid.step - outer, grid.negative + 1, codes - 1


def _decoder(grid: Grid) -> tuple[Any, ...]:
    """Return the other arguments of `_middle`."""
    return grid.step, grid.negative + 0.5, -grid.below, grid.above, grid.coarse - 1


def _number(
    x: Tensor,
    lowest: float,
    highest: float,
    outer: float,
    below: float,
    above: float,
    inner: float,
    offset: float,
    zero: float,
) -> Tensor:
    """Return the code of x, in x's dtype; NaN gets the code of the lowest interval."""
    within = torch.where(x > lowest, x, lowest)
    within = torch.where(within < highest, within, highest)
    near = torch.where(x > below, x, below)
    near = torch.where(near < above, near, above)
    steps = within * outer + near * inner
    return torch.where(x == 0, zero, torch.trunc(steps) + torch.where(x < 0, offset - 1, offset))


def _middle(codes: Tensor, step: float, offset: float, below: float, above: float, more: float) -> Tensor:
    """Return the midpoint of the interval of each code; an open interval counts as one of the usual width."""
    steps = codes - offset
    steps = steps + more * (torch.relu(steps - above) - torch.relu(below - steps))
    return step * steps


def encode(x: Tensor, save: str, levels: Levels) -> tuple[Tensor, Code]:
    """Return relu(x) and the codes of x, in one pass over memory."""
    if not _has_kernel(x):
        return torch.relu(x), Code(_pack(_codes(x, *levels.encoder), save), save, levels, None)
    y, count = torch.empty_like(x), x.numel()
    codes = torch.empty(count if save == "uint8" else (count + 1) // 2, dtype=torch.uint8, device=x.device)
    code = Code(codes, save, levels, y.stride())
    _call("encode", as_laid_out(x, y), y, code)
    return y, code


def times_decoded(grad: Tensor, code: Code) -> Tensor:
    """Return `grad` times the derivative that `code` holds, in the shape, dtype and memory format of the input."""
    codes, save, levels, strides = code
    if strides is not None and _has_kernel(grad, codes):
        out = torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device)
        _call("decode", as_laid_out(grad, out), out, code)
        return out
    numbers = _unpack(codes, save, grad.numel())
    numbers = numbers.view(grad.shape) if strides is None else numbers.as_strided(grad.shape, strides)
    wide = opmath(grad)
    derivative = torch.tensor(levels.table, dtype=wide.dtype, device=wide.device)[numbers.to(torch.int32)]
    return (wide * derivative).to(grad.dtype)


def _has_kernel(*tensors: Tensor) -> bool:
    if not may_read(*tensors):
        return False
    if tensors[0].is_cuda:
        return cuda.lean() is not None
    return tensors[0].is_cpu and cpu.library(None) is not None


def _call(name: str, source: Tensor, out: Tensor, code: Code) -> None:
    which = "encoder" if name == "encode" else "table"
    if source.is_cuda:
        levels = code.levels.as_tensor(which, source)
        getattr(cuda.lean(), name)(source, out, code.codes, levels, code.save)
        return
    function = getattr(cpu.library(None), f"{name}_{code.save}_{str(source.dtype)[6:]}")
    address = (source.data_ptr(), out.data_ptr(), code.codes.data_ptr())
    function(*address, source.numel(), code.levels.as_doubles(which), torch.get_num_threads())


def _parts(x: Tensor, save: str) -> tuple[Tensor, ...]:
    """Return the parts of a 1-D tensor that share bytes: the whole tensor, or its two halves."""
    half = (x.shape[0] + 1) // 2
    return (x,) if save == "uint8" else (x[:half], x[x.shape[0] - half :])


def _codes(x: Tensor, *encoder: float) -> Tensor:
    x = opmath(x)
    return torch.where(x == x, _number(x, *encoder), 0.0).to(torch.int32)


def _pack(codes: Tensor, save: str) -> Tensor:
    """Pack codes into bytes."""
    if save == "uint8":
        return codes.to(torch.uint8)
    low, high = _parts(codes.reshape(-1), save)
    return (low + 16 * high).to(torch.uint8)


def _unpack(codes: Tensor, save: str, count: int) -> Tensor:
    """Unpack bytes into a 1-D tensor of codes."""
    codes = codes.reshape(-1)
    return codes if save == "uint8" else torch.cat([codes & 15, codes[2 * codes.shape[0] - count :] >> 4])
