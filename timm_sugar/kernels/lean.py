"""Lean saving: one byte or half a byte an element stands for the pre-activation.

Every code is an interval of x and stands for the surrogate's derivative in the middle of it. The intervals are fitted
to the surrogate: narrow where its derivative bends, and wider by a factor on either side. The outermost are open. 0 has
a code of its own and no interval crosses it, so that neither a step of the derivative at 0 nor its sign is lost. Code 0
means NaN and the largest code 0.0; those between number the intervals from the lowest up. The derivative is looked up
in a table, whose error is that of its few entries and not of the arithmetic. Few-bit backward passes: Novikov et al.,
arXiv:2202.00441.

Two codes of half a byte share a byte: one from the first half of the flat tensor and one from the second, so that
loads stay contiguous; where there is an odd number of elements, both hold the middle one. On the CPU the passes are
those of kernels.cpp, on a GPU those of lean_triton.py.
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
    """Intervals of x, counted in steps from 0, negative ones below it."""

    step: Tensor  # width of the narrow intervals
    negative: Tensor  # how many intervals are below 0; an integer
    below: Tensor  # the narrow ones reach from -below * step ...
    above: Tensor  # ... to above * step, and need not end at the end of an interval
    coarse: Tensor  # width, in steps, of the intervals below and above them


@dataclass(frozen=True, eq=False)
class Levels:
    """What encoder and decoder take.

    Attributes:
        encoder: For `_number`.
        table: The derivative that each code stands for.
        kept: Both as kernels take them, made once.
    """

    encoder: tuple[float, ...]
    table: tuple[float, ...]
    kept: dict[Any, Any] = field(default_factory=dict)

    def as_doubles(self, name: str) -> Array[c_double]:
        """Return `encoder` or `table` for C."""
        if name not in self.kept:
            values = getattr(self, name)
            self.kept[name] = (c_double * len(values))(*values)
        return self.kept[name]  # type: ignore[no-any-return]

    def as_tensor(self, name: str, like: Tensor) -> Tensor:
        """Return `encoder` or `table` in the dtype that `like` is computed in and on its device."""
        key = name, like.dtype, like.device
        if key not in self.kept:
            self.kept[key] = torch.tensor(getattr(self, name), dtype=opmath_dtype(like.dtype), device=like.device)
        return self.kept[key]  # type: ignore[no-any-return]


class Code(NamedTuple):
    """Pre-activations, encoded, and what is needed to decode them."""

    codes: Tensor  # uint8, one byte or half a byte an element
    save: str
    levels: Levels
    strides: tuple[int, ...] | None  # of the dense tensor whose memory was encoded; None where its elements were


_CODES = {"uint8": 256, "uint4": 16}


@lru_cache(maxsize=256)
def levels_of(surrogate: Surrogate, alpha: float | None, save: str) -> Levels:
    """Fit the levels to a surrogate, in a quarter of a second and once.

    Args:
        surrogate: An entry of the table.
        alpha: Its shape parameter, or None.
        save: "uint8" or "uint4".

    Raises:
        ValueError: the derivative is not bounded.
    """
    # In a thread of its own, where no tracer or transform of the caller's sees the tensors.
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
    """Search the grid with the least squared error of the derivative, relative to its square.

    The error is that for inputs from N(0, 1), plus a part of that for inputs from N(0, 9): what half a byte can tell
    apart is needed where inputs are likely; a byte has room for unlikely ones.
    """
    normal = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400)
    x = torch.stack([normal, 3 * normal])
    exact = derivative(x)
    weights = torch.tensor([1.0, 0.3 if intervals == 14 else 1.0]).double() / exact.square().sum(1).clamp(min=1e-30)

    def errors(grids: Tensor) -> Tensor:
        columns = Grid(*grids.T[:, :, None, None])
        found = derivative(_middle(_number(x, *_encoder(columns, intervals + 2)), *_decoder(columns)))
        return ((found - exact).square().sum(2) * weights).sum(1)

    many = intervals / 14  # as many intervals for each that a 4-bit code has
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
    for _ in range(25):  # one value at a time up or down; by less where none of that helps
        scaled = [torch.where(torch.arange(5) == i, factor**sign, 1.0) for i in (0, 2, 3, 4) for sign in (1, -1)]
        tried = torch.stack([grids, *(grids * scale for scale in scaled), grids + shift, grids - shift])
        tried[..., 1].clamp_(1, intervals - 1)
        tried[..., 4].clamp_(min=1.0)
        best = errors(tried.flatten(0, 1)).view(tried.shape[:2]).argmin(0)
        grids = tried[best, torch.arange(len(grids))]
        factor = torch.where(best[:, None] == 0, factor.sqrt(), factor)
    return Grid(*grids[errors(grids).argmin()])


def _encoder(grid: Grid, codes: int) -> tuple[Any, ...]:
    """Return what `_number` takes beside x; the ends are within the outermost intervals, so that these are open."""
    lowest, highest = (_middle(torch.full_like(grid.step, code), *_decoder(grid)) for code in (1, codes - 2))
    below, above = torch.maximum(-grid.below * grid.step, lowest), torch.minimum(grid.above * grid.step, highest)
    outer = 1 / (grid.coarse * grid.step)
    return lowest, highest, outer, below, above, 1 / grid.step - outer, grid.negative + 1, codes - 1


def _decoder(grid: Grid) -> tuple[Any, ...]:
    """Return what `_middle` takes beside codes."""
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
    """Return the code of x, as a number of x's dtype; NaN has that of the lowest."""
    within = torch.where(x > lowest, x, lowest)
    within = torch.where(within < highest, within, highest)
    near = torch.where(x > below, x, below)
    near = torch.where(near < above, near, above)
    steps = within * outer + near * inner
    return torch.where(x == 0, zero, torch.trunc(steps) + torch.where(x < 0, offset - 1, offset))


def _middle(codes: Tensor, step: float, offset: float, below: float, above: float, more: float) -> Tensor:
    """Return the middle of intervals by code, a number; of an open one, where it would be at the usual width."""
    steps = codes - offset
    steps = steps + more * (torch.relu(steps - above) - torch.relu(below - steps))
    return step * steps


def encode(x: Tensor, save: str, levels: Levels) -> tuple[Tensor, Code]:
    """Return relu(x), and the codes of x, from one pass over memory."""
    if not _has_kernel(x):
        return torch.relu(x), Code(_pack(_codes(x, *levels.encoder), save), save, levels, None)
    y, count = torch.empty_like(x), x.numel()
    codes = torch.empty(count if save == "uint8" else (count + 1) // 2, dtype=torch.uint8, device=x.device)
    code = Code(codes, save, levels, y.stride())
    _call("encode", as_laid_out(x, y), y, code)
    return y, code


def times_decoded(grad: Tensor, code: Code) -> Tensor:
    """Return `grad` times the derivative at what `code` holds, in the shape, dtype and memory format of the input."""
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
    """Return what of a 1-D tensor goes into one byte: the whole, or one half each."""
    half = (x.shape[0] + 1) // 2
    return (x,) if save == "uint8" else (x[:half], x[x.shape[0] - half :])


def _codes(x: Tensor, *encoder: float) -> Tensor:
    x = opmath(x)
    return torch.where(x == x, _number(x, *encoder), 0.0).to(torch.int32)


def _pack(codes: Tensor, save: str) -> Tensor:
    """Return codes as bytes."""
    if save == "uint8":
        return codes.to(torch.uint8)
    low, high = _parts(codes.reshape(-1), save)
    return (low + 16 * high).to(torch.uint8)


def _unpack(codes: Tensor, save: str, count: int) -> Tensor:
    """Return the codes that bytes hold, in one dimension."""
    codes = codes.reshape(-1)
    return codes if save == "uint8" else torch.cat([codes & 15, codes[2 * codes.shape[0] - count :] >> 4])
