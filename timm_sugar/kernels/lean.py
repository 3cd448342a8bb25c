"""Lean saving: one byte or half a byte an element stands for the pre-activation.

Every code is an interval of x and stands for the surrogate's derivative in the middle of it. The intervals are fitted
to the surrogate: of one width in a byte; in half a byte narrow where the derivative bends, and wider by a factor on
either side. The outermost are open. 0 has a code of its own and no interval crosses it, so that neither a step of the
derivative at 0 nor its sign is lost. Code 0 means NaN and the largest code 0.0; those between number the intervals
from the lowest up. From a byte the derivative is computed; of the 16 that half a byte tells apart, it is selected.
Few-bit backward passes: Novikov et al., arXiv:2202.00441.

Processors are slow at handling single bytes, so the kernels pack codes into words of 32 bits: a word holds one code of
each of 4 or 8 parts of the flat tensor, so that loads stay contiguous; its type is float32, since Inductor's loads of
floats are the fast ones. Where the parts are not of one length, they overlap. Where no kernel runs, `_pack` packs
bytes.
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
    """Intervals of x, counted in steps from 0, negative ones below it."""

    step: Tensor  # width of the narrow intervals
    negative: Tensor  # how many intervals are below 0; an integer
    below: Tensor  # the narrow ones reach from -below * step ...
    above: Tensor  # ... to above * step, and need not end at the end of an interval
    coarse_below: Tensor  # width, in steps, of the intervals below them
    coarse_above: Tensor  # and above them


class Levels(NamedTuple):
    """What encoder and decoder take."""

    encoder: tuple[float, ...]  # for `_number`
    decoder: tuple[float, ...]  # for `_derivative`, or of 4-bit codes the table
    table: tuple[float, ...]  # the derivative that each code stands for


class Code(NamedTuple):
    """Pre-activations, encoded, and what is needed to decode them."""

    codes: Tensor  # words from a kernel, else bytes: one byte or half a byte an element
    save: str
    levels: Levels
    strides: tuple[int, ...] | None  # of the tensor whose memory a kernel encoded; None where none ran


_CODES = {"uint8": 256, "uint4": 16}
_PARTS = {"uint8": 4, "uint4": 8}  # codes in a word
# Parts that one call of a kernel does: more would take longer to compile, and fewer read the words more often.
_ENCODED, _DECODED = 4, 2


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
        codes = _CODES[save]
        grid = _fit(derivative, codes - 2, one_width=save == "uint8")
        encoder = tuple(float(value) for value in _encoder(grid, codes))
        at_zero = derivative(torch.zeros((), dtype=torch.float64)).item()
        middles = _middle(torch.arange(1, codes - 1, dtype=torch.float64), *_decoder(grid))
        table = (math.nan, *derivative(middles).tolist(), at_zero)
        if save == "uint4":
            return Levels(encoder, table, table)
        return Levels(encoder[:5], (codes - 1.0, at_zero, *map(float, _decoder(grid)[:2])), table)  # without bends


def _is_bounded(derivative: Callable[[Tensor], Tensor]) -> bool:
    magnitudes = torch.cat([torch.arange(0, 50, 1e-3, dtype=torch.float64), torch.logspace(1.7, 30, 1_000).double()])
    found = derivative(torch.cat([-magnitudes, magnitudes])).abs().view(2, -1)
    return bool(found.max() <= 4 * found[:, magnitudes <= 1e3].max())


def _fit(derivative: Callable[[Tensor], Tensor], intervals: int, one_width: bool) -> Grid:
    """Search the grid with the least squared error of the derivative, relative to its square.

    The error is that for inputs from N(0, 1), plus a part of that for inputs from N(0, 9): what half a byte can tell
    apart is needed where inputs are likely; a byte has room for unlikely ones.
    """
    normal = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400)
    x = torch.stack([normal, 3 * normal])
    exact = derivative(x)
    weights = torch.tensor([1.0, 1.0 if one_width else 0.3]).double() / exact.square().sum(1).clamp(min=1e-30)

    def errors(grids: Tensor) -> Tensor:
        columns = Grid(*grids.T[:, :, None, None])
        found = derivative(_middle(_number(x, *_encoder(columns, intervals + 2)), *_decoder(columns)))
        return ((found - exact).square().sum(2) * weights).sum(1)

    many = intervals / 14  # as many intervals for each that a 4-bit code has
    coarse = 1.0 if one_width else 4.0
    starts = [
        (step / many, negative, 0.8 * negative, 0.6 * (intervals - negative), coarse, coarse)
        for step in torch.logspace(-6, 2, 17, base=2).tolist()
        for negative in (round(many * i) for i in range(3, 12))
    ]
    grids = torch.tensor(starts, dtype=torch.float64)
    grids = grids[errors(grids).topk(3, largest=False).indices]
    factor = torch.full((len(grids), 1), 1.3, dtype=torch.float64)
    shift = torch.zeros(6, dtype=torch.float64)
    shift[1] = round(many)
    for _ in range(25):  # one value at a time up or down; by less where none of that helps
        values = (0,) if one_width else (0, 2, 3, 4, 5)
        scaled = [torch.where(torch.arange(6) == i, factor**sign, 1.0) for i in values for sign in (1, -1)]
        tried = torch.stack([grids, *(grids * scale for scale in scaled), grids + shift, grids - shift])
        tried[..., 1].clamp_(1, intervals - 1)
        tried[..., 4:].clamp_(min=1.0)
        best = errors(tried.flatten(0, 1)).view(tried.shape[:2]).argmin(0)
        grids = tried[best, torch.arange(len(grids))]
        factor = torch.where(best[:, None] == 0, factor.sqrt(), factor)
    return Grid(*grids[errors(grids).argmin()])


def _encoder(grid: Grid, codes: int) -> tuple[Any, ...]:
    """Return what `_number` takes beside x; the ends are within the outermost intervals, so that these are open."""
    fine = 1 / grid.step
    below = -grid.below * grid.step, fine - fine / grid.coarse_below
    above = grid.above * grid.step, fine - fine / grid.coarse_above
    lowest, highest = (_middle(torch.full_like(grid.step, code), *_decoder(grid)) for code in (1, codes - 2))
    return lowest, highest, fine, grid.negative + 1, codes - 1, *below, *above


def _decoder(grid: Grid) -> tuple[Any, ...]:
    """Return what `_middle` takes beside codes."""
    return grid.step, grid.negative + 0.5, -grid.below, grid.coarse_below - 1, grid.above, grid.coarse_above - 1


def _number(x: Tensor, lowest: float, highest: float, fine: float, offset: float, zero: float, *bends: float) -> Tensor:
    """Return the code of x, as a number of x's dtype; NaN stays NaN."""
    within = torch.where(x > highest, highest, torch.where(x < lowest, lowest, x))
    steps = within * fine
    if bends:
        below, less_below, above, less_above = bends
        steps = steps + less_below * torch.relu(below - within) - less_above * torch.relu(within - above)
    return torch.where(x == 0, zero, torch.floor(steps) + offset)


def _middle(codes: Tensor, step: float, offset: float, *bends: float) -> Tensor:
    """Return the middle of intervals by code, a number; of an open one, where it would be at the usual width."""
    steps = codes - offset
    if bends:
        below, more_below, above, more_above = bends
        steps = steps - more_below * torch.relu(below - steps) + more_above * torch.relu(steps - above)
    return step * steps


def _derivative(
    codes: Tensor, surrogate: Surrogate, alpha: Any, zero: float, at_zero: float, *decoder: float
) -> Tensor:
    """Return the derivative that codes, as numbers, stand for."""
    found = surrogate.derivative(_middle(codes, *decoder), alpha)
    return torch.where(codes == 0, math.nan, torch.where(codes == zero, at_zero, found))


def encode(x: Tensor, save: str, levels: Levels) -> tuple[Tensor, Code]:
    """Return relu(x), and the codes of x, from one pass over memory."""
    if not is_plain(x) or x.numel() == 0:
        return torch.relu(x), Code(_pack(_codes(x, *levels.encoder), save), save, levels, None)
    y = torch.empty_like(x)
    if y.stride() != x.stride():  # y is dense, x is not
        x = y.clone().copy_(x)
    parts = _parts(flat(x), save)
    words = torch.empty_like(parts[0], dtype=torch.float32)
    pairs: list[Any] = [*zip(parts, _parts(flat(y), save), strict=True)]
    for first in range(0, len(pairs), _ENCODED):
        bits = 32.0 // len(pairs)
        position = bits * first, bits, 0.0 if first == 0 else -1.0
        run(write_codes, None, (*sum(pairs[first : first + _ENCODED], ()), words), position + levels.encoder)
    return y, Code(words, save, levels, y.stride())


def times_decoded(grad: Tensor, code: Code, surrogate: Surrogate, alpha: float | None) -> Tensor:
    """Return `grad` times the derivative at what `code` holds, in the shape, dtype and memory format of the input."""
    codes, save, levels, strides = code
    if is_plain(grad, codes) and strides is not None:
        out = torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device)
        if grad.stride() != strides:
            grad = torch.empty_like(out).copy_(grad)
        pairs: list[Any] = [*zip(_parts(flat(grad), save), _parts(flat(out), save), strict=True)]
        body: Any = write_selected_product
        entry, constants = None, levels.decoder
        if save == "uint8":
            body, entry, constants = write_product, surrogate, constants + (() if alpha is None else (alpha,))
        for first in range(0, len(pairs), _DECODED):
            tensors = (*sum(pairs[first : first + _DECODED], ()), codes)
            run(body, entry, tensors, (32.0 // len(pairs) * first, *constants))
        return out
    if strides is None:
        numbers = _unpack(codes, save, grad.numel()).view(grad.shape)
    else:
        numbers = torch.empty(grad.numel(), dtype=torch.int32, device=codes.device)
        for i, part in enumerate(_parts(numbers, save)):
            part.copy_(codes.view(torch.int32) >> 32 // _PARTS[save] * i & _CODES[save] - 1)
        numbers = numbers.as_strided(grad.shape, strides)
    wide = opmath(grad)
    derivative = torch.tensor(levels.table, dtype=wide.dtype, device=wide.device)[numbers.to(torch.int32)]
    return (wide * derivative).to(grad.dtype)


def write_codes(_: None, *tensors: Tensor) -> None:
    """Write parts of y, and their codes into the words.

    Args:
        tensors: A part of x and that of y, the next two, ...; words; the first part's bit in them; bits of a code; -1,
            or 0 where the words are new; then the arguments of `_number`.
    """
    *pairs, words = tensors[: 2 * _ENCODED + 1]
    shift, bits, keep = (constant.to(torch.int32) for constant in tensors[2 * _ENCODED + 1 : 2 * _ENCODED + 4])
    encoder: Any = tensors[2 * _ENCODED + 4 :]
    word = words.view(torch.int32) & keep
    for i, (x, y) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
        word = word | _codes(x, *encoder) << shift + bits * i
        y.copy_(torch.relu(x))
    words.copy_(word.view(torch.float32))


def write_product(surrogate: Surrogate, *tensors: Tensor) -> None:
    """Write parts of a gradient from 8-bit codes.

    Args:
        surrogate: The entry of the table.
        tensors: A part of the upstream gradient and that of the result, the next two, ...; words; the first part's bit
            in them; the last arguments of `_derivative`; alpha if the surrogate has one.
    """
    parts, constants = _decoded(tensors, 8)
    alpha = constants.pop() if surrogate.alpha is not None else None
    for grad, out, codes in parts:
        wide = opmath(grad)
        out.copy_(wide * _derivative((codes & 255).to(wide.dtype), surrogate, alpha, *constants))


def write_selected_product(_: None, *tensors: Tensor) -> None:
    """Write parts of a gradient from 4-bit codes; as `write_product`, with a table of derivatives at the end."""
    parts, table = _decoded(tensors, 4)
    for grad, out, codes in parts:
        left = table
        for i in range(4):
            bit = (codes & 1 << i) != 0
            left = [torch.where(bit, odd, even) for even, odd in zip(left[::2], left[1::2], strict=True)]
        out.copy_(opmath(grad) * left[0])


def _decoded(tensors: tuple[Tensor, ...], bits: int) -> tuple[list[tuple[Tensor, Tensor, Tensor]], list[Any]]:
    *pairs, words = tensors[: 2 * _DECODED + 1]
    shift, *constants = tensors[2 * _DECODED + 1 :]
    codes = [words.view(torch.int32) >> shift.to(torch.int32) + bits * i for i in range(_DECODED)]
    return list(zip(pairs[::2], pairs[1::2], codes, strict=True)), constants


def _parts(x: Tensor, save: str) -> list[Tensor]:
    """Return parts of one length that cover a flat tensor."""
    count, total = _PARTS[save], x.shape[0]
    length = -(-total // count)
    if length % 1024 == 0:  # a power of 2, say: shifted by a cache line, or all would compete for one set of the cache
        length += 16 * (count - 1)
    return [x[start : start + length] for start in ((total - length) * i // (count - 1) for i in range(count))]


def _codes(x: Tensor, *encoder: float) -> Tensor:
    x = opmath(x)
    return torch.where(x == x, _number(x, *encoder), 0.0).to(torch.int32)


def _pack(codes: Tensor, save: str) -> Tensor:
    """Return codes as bytes; two of half a byte share one, from the two halves, which overlap where there is an odd."""
    if save == "uint8":
        return codes.to(torch.uint8)
    codes = codes.reshape(-1)
    half = (codes.shape[0] + 1) // 2
    return (codes[:half] + 16 * codes[codes.shape[0] - half :]).to(torch.uint8)


def _unpack(codes: Tensor, save: str, count: int) -> Tensor:
    return codes if save == "uint8" else torch.cat([codes & 15, codes[2 * codes.shape[0] - count :] >> 4])
