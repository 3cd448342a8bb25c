"""Lean saving: one byte or half a byte an element stands for the pre-activation.

Every code is an interval of x, and a table holds the surrogate's derivative in the middle of each. The intervals are
fitted to the surrogate: narrow where its derivative bends, wider by a factor on either side, open at both ends. 0 has
a code of its own and no interval crosses it, so that neither a step of the derivative at 0 nor its sign is lost. Code
0 means NaN. Two 4-bit codes share a byte, one from each half of the flat tensor, so that loads stay contiguous; where
the length is odd the halves overlap in the middle element. Few-bit backward passes: Novikov et al., arXiv:2202.00441.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..surrogates import Surrogate, get_surrogate
from .compiled import flat, is_plain, opmath, run


class Grid(NamedTuple):
    """Intervals of x, numbered away from 0: (0, step] is number 1, [-step, 0) number -1, and 0 itself number 0."""

    step: Tensor  # width of the narrow intervals
    below: Tensor  # they reach from -below * step ...
    above: Tensor  # ... to above * step, and need not end at the end of an interval
    coarse_below: Tensor  # width, in steps, of the intervals below them
    coarse_above: Tensor  # and above them
    negative: Tensor  # how many intervals are below 0; an integer


class Levels(NamedTuple):
    """How codes stand for derivatives: code 0 is NaN, and the others number the intervals from the lowest up."""

    encoder: tuple[float, ...]  # what `_quantise` takes beside x
    table: tuple[float, ...]  # the derivative of each code


class Code(NamedTuple):
    """Pre-activations, encoded, and what is needed to decode their derivatives."""

    codes: Tensor  # uint8 of x's size, or of half that in one dimension
    levels: Levels
    strides: tuple[int, ...] | None  # of the tensor whose memory order 4-bit codes follow; None for its logical order


_CODES = {"uint8": 256, "uint4": 16}


@torch.compiler.assume_constant_result  # torch.compile evaluates it once for each graph
def levels_of(surrogate: str, alpha: str, save: str) -> Levels:
    """Fit the levels to a named surrogate, in a quarter of a second and once.

    Args:
        surrogate: A name of the table.
        alpha: Its shape parameter or None, as text: torch.compile makes a symbol of a number, but not of its text.
        save: "uint8" or "uint4".

    Raises:
        ValueError: the derivative is not bounded.
    """
    return _levels(get_surrogate(surrogate), None if alpha == "None" else float(alpha), save)


@lru_cache(maxsize=256)
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
        intervals = _CODES[save] - 2
        # What half a byte can tell apart is needed where inputs are likely; a byte has room for unlikely ones.
        grid = _fit(derivative, intervals, wide=0.3 if save == "uint4" else 1.0)
        numbers = torch.arange(_CODES[save] - 1, dtype=torch.float64) - grid.negative
        table = derivative(_middle(numbers, grid)).tolist()
        return Levels(tuple(value.item() for value in _encoder(grid, intervals)), (math.nan, *table))


def _is_bounded(derivative: Callable[[Tensor], Tensor]) -> bool:
    magnitudes = torch.cat([torch.arange(0, 50, 1e-3, dtype=torch.float64), torch.logspace(1.7, 30, 1_000).double()])
    found = derivative(torch.cat([-magnitudes, magnitudes])).abs().view(2, -1)
    return bool(found.max() <= 4 * found[:, magnitudes <= 1e3].max())


def _fit(derivative: Callable[[Tensor], Tensor], intervals: int, wide: float) -> Grid:
    """Search the grid with the least squared error of the derivative, relative to its square.

    The error is that for inputs from N(0, 1), plus `wide` times that for inputs from N(0, 9).
    """
    normal = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400)
    x = torch.stack([normal, 3 * normal])
    exact = derivative(x)
    weights = torch.tensor([1.0, wide]).double() / exact.square().sum(1).clamp(min=1e-30)

    def errors(grids: Tensor) -> Tensor:
        columns = Grid(*grids.T[:, :, None, None])
        codes = _quantise(x, *_encoder(columns, intervals))
        found = derivative(_middle(codes - 1 - columns.negative, columns))
        return ((found - exact).square().sum(2) * weights).sum(1)

    many = intervals / 14  # as many intervals for each that a 4-bit code has
    starts = [
        (step / many, 0.8 * negative, 0.6 * (intervals - negative), 4.0, 4.0, negative)
        for step in torch.logspace(-6, 1, 15, base=2).tolist()
        for negative in (round(many * i) for i in range(3, 12))
    ]
    grids = torch.tensor(starts, dtype=torch.float64)
    grids = grids[errors(grids).topk(3, largest=False).indices]
    factor = torch.full((len(grids), 1), 1.3, dtype=torch.float64)
    shift = torch.zeros(6, dtype=torch.float64)
    shift[-1] = round(many)
    for _ in range(25):  # one value at a time up or down; by less where none of that helps
        scaled = [torch.where(torch.arange(6) == i, factor**sign, 1.0) for i in range(5) for sign in (1, -1)]
        tried = torch.stack([grids, *(grids * scale for scale in scaled), grids + shift, grids - shift])
        tried[..., 3:5].clamp_(min=1.0)
        tried[..., 5].clamp_(1, intervals - 1)
        best = errors(tried.flatten(0, 1)).view(tried.shape[:2]).argmin(0)
        grids = tried[best, torch.arange(len(grids))]
        factor = torch.where(best[:, None] == 0, factor.sqrt(), factor)
    return Grid(*grids[errors(grids).argmin()])


def _middle(numbers: Tensor, grid: Grid) -> Tensor:
    """Return the middle of intervals by number; of an open one, what its middle would be if it had the usual width."""
    steps = numbers - 0.5 * numbers.sign()
    inner = torch.where(steps > grid.above, grid.above, torch.where(steps < -grid.below, -grid.below, steps))
    outer = grid.coarse_above * torch.relu(steps - grid.above) - grid.coarse_below * torch.relu(-grid.below - steps)
    return grid.step * (inner + outer)


def encode(x: Tensor, save: str, levels: Levels) -> tuple[Tensor, Code]:
    """Return relu(x), and the codes of x, from one pass over memory."""
    if not is_plain(x) or x.numel() == 0:
        if save == "uint8":
            codes = _quantise(x, *levels.encoder)
        else:
            first, second = _halves(x.reshape(-1))
            codes = _pack(_quantise(first, *levels.encoder), _quantise(second, *levels.encoder))
        return torch.relu(x), Code(codes.to(torch.uint8), levels, None)
    y = torch.empty_like(x)
    if y.stride() != x.stride():  # y is dense, x is not
        x = y.clone().copy_(x)
    if save == "uint8":
        codes = torch.empty_like(x, dtype=torch.uint8)
        run(write_codes, None, (flat(x), flat(y), flat(codes)), levels.encoder)
    else:
        codes = x.new_empty((x.numel() + 1) // 2, dtype=torch.uint8)
        run(write_packed_codes, None, (*_halves(flat(x)), *_halves(flat(y)), codes), levels.encoder)
    return y, Code(codes, levels, y.stride())


def times_decoded(grad: Tensor, code: Code) -> Tensor:
    """Return `grad` times the derivative that `code` holds, in the shape, dtype and memory format of the input."""
    codes, levels, strides = code
    packed = len(levels.table) == _CODES["uint4"]
    if is_plain(grad, codes) and strides is not None:
        out = torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device)
        if grad.stride() != strides:
            grad = torch.empty_like(out).copy_(grad)
        if packed:
            tensors = (*_halves(flat(grad)), codes, *_halves(flat(out)))
            run(write_packed_product, None, tensors, (levels.table,))
        else:
            run(write_decoded_product, None, (flat(grad), flat(codes), flat(out)), (levels.table,))
        return out
    if packed:
        both = torch.cat([codes & 15, codes[2 * len(codes) - grad.numel() :] >> 4])
        codes = both.view(grad.shape) if strides is None else both.as_strided(grad.shape, strides)
    wide = opmath(grad)
    table = torch.tensor(levels.table, dtype=wide.dtype, device=wide.device)
    return (wide * table[codes.to(torch.int32)]).to(grad.dtype)


def write_codes(_: None, x: Tensor, y: Tensor, codes: Tensor, *encoder: float) -> None:
    codes.copy_(_quantise(x, *encoder).to(torch.uint8))
    y.copy_(torch.relu(x))


def write_packed_codes(
    _: None, x_first: Tensor, x_second: Tensor, y_first: Tensor, y_second: Tensor, codes: Tensor, *encoder: float
) -> None:
    codes.copy_(_pack(_quantise(x_first, *encoder), _quantise(x_second, *encoder)).to(torch.uint8))
    y_first.copy_(torch.relu(x_first))
    y_second.copy_(torch.relu(x_second))


def write_decoded_product(_: None, grad: Tensor, codes: Tensor, out: Tensor, table: Tensor) -> None:
    out.copy_(opmath(grad) * table[codes.to(torch.int32)])


def write_packed_product(
    _: None,
    grad_first: Tensor,
    grad_second: Tensor,
    codes: Tensor,
    out_first: Tensor,
    out_second: Tensor,
    table: Tensor,
) -> None:
    # Of so short a table, an element is selected in fewer instructions than it is loaded.
    pairs = codes.to(torch.int32)
    bits = [(pairs & (1 << i)) != 0 for i in range(8)]
    out_first.copy_(opmath(grad_first) * _select(table, bits[:4]))
    out_second.copy_(opmath(grad_second) * _select(table, bits[4:]))


def _select(table: Tensor, bits: list[Tensor]) -> Tensor:
    left: list[Tensor] = list(table.split(1))
    for bit in bits:
        left = [torch.where(bit, odd, even) for even, odd in zip(left[::2], left[1::2], strict=True)]
    return left[0]


def _encoder(grid: Grid, intervals: int) -> tuple[Any, ...]:
    """Return what `_quantise` takes beside x; the ends are within the outermost intervals, so that these are open."""
    fine = 1 / grid.step
    turns = (
        -grid.below * grid.step,
        fine - fine / grid.coarse_below,
        grid.above * grid.step,
        fine - fine / grid.coarse_above,
    )
    ends = _middle(-grid.negative, grid), _middle(intervals - grid.negative, grid)
    return fine, *turns, *ends, grid.negative + 1


def _quantise(
    x: Tensor,
    fine: float,
    below: float,
    less_below: float,
    above: float,
    less_above: float,
    lowest: float,
    highest: float,
    zero: float,
) -> Tensor:
    # Every operation here is a few vector instructions: isnan, and clamp of a float, are not. The conversion makes of
    # NaN the lowest integer or 0, as the processor has it.
    x = opmath(x)
    x = torch.where(x > highest, highest, torch.where(x < lowest, lowest, x))
    steps = fine * x + less_below * torch.relu(below - x) - less_above * torch.relu(x - above)
    number = torch.where(x > 0, torch.ceil(steps), torch.floor(steps))
    return (number + zero).to(torch.int32).clamp(min=0)


def _pack(first: Tensor, second: Tensor) -> Tensor:
    return first + 16 * second


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    half = (x.shape[0] + 1) // 2
    return x[:half], x[x.shape[0] - half :]
