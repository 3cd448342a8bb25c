"""Lean saving: bits, errors of the gradient, and surrogates of any shape."""

import pytest
import torch

from timm_sugar import list_surrogates, sugar, surrogates
from timm_sugar.kernels.lean import Code, _codes, _pack, encode, levels_of, times_decoded
from timm_sugar.surrogates import Surrogate, add_surrogate, get_surrogate

CODES = {"uint8": 254, "uint4": 14}  # beside those that mean NaN and 0


def gradient(x: torch.Tensor, name: str, save: str, upstream: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(sugar(x, name, save=save), x, upstream)[0]


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(surrogates, "_SURROGATES", dict(surrogates._SURROGATES))


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("save", "bound"), [("uint8", 0.004), ("uint4", 0.04)])
def test_relative_error_of_the_bsilu_gradient(save, bound, scale):
    generator = torch.Generator().manual_seed(0)
    x, upstream = torch.randn(2, 200_001, generator=generator)
    exact = gradient(scale * x, "bsilu", "exact", upstream)
    error = gradient(scale * x, "bsilu", save, upstream) - exact
    assert error.norm() <= bound * exact.norm()


@pytest.mark.parametrize("save", CODES)
def test_nelu_keeps_every_sign(save):
    magnitudes = torch.logspace(-12, 12, 10_001)
    x = torch.cat([-magnitudes, torch.zeros(1), magnitudes])
    upstream = torch.ones_like(x)
    assert torch.equal(gradient(x, "nelu", save, upstream).sign(), gradient(x, "nelu", "exact", upstream).sign())


@pytest.mark.parametrize("save", CODES)
@pytest.mark.parametrize("name", list_surrogates())
def test_every_code_is_an_interval_and_stands_for_a_derivative_within_it(name, save):
    entry = get_surrogate(name)
    levels = levels_of(entry, entry.alpha, save)
    x = torch.cat([torch.linspace(-60, 0, 150_001), torch.linspace(0, 60, 150_001)]).double()
    codes = torch.empty_like(x, dtype=torch.int32).copy_(_codes(x, *levels.encoder))
    assert (codes[x != 0].diff() >= 0).all()
    assert codes[x != 0].unique().tolist() == [*range(1, CODES[save] + 1)]
    assert codes[x < 0].max() < codes[x > 0].min()
    assert codes[x == 0].unique().tolist() == [CODES[save] + 1]
    derivative = entry.derivative(x, entry.alpha)
    code = Code(_pack(codes, save), save, levels, None)
    stands_for = times_decoded(torch.ones_like(x), code)
    for number in range(1, CODES[save] + 2):
        within = derivative[codes == number]
        assert stands_for[codes == number].unique().numel() == 1
        assert within.min() - 1e-3 <= stands_for[codes == number][0] <= within.max() + 1e-3


def without_kernel(x: torch.Tensor, save: str, levels) -> Code:
    return Code(_pack(_codes(x, *levels.encoder), save), save, levels, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("save", CODES)
@pytest.mark.parametrize("size", [1, 2, 7, 1000, 4096, 4097, 100_001])
def test_kernels_do_what_the_operations_do_to_the_bit(save, size, dtype):
    x, upstream = torch.randn(2, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-7, -1e-7], dtype=dtype)[: size // 2]
    x[: len(special)] = special
    levels = levels_of(get_surrogate("bsilu"), 1.67, save)
    with torch.no_grad():
        y, code = encode(x, save, levels)
        result = times_decoded(upstream, code)
    assert code.strides == (1,)  # a kernel ran
    assert torch.equal(y, x.relu())
    expected = without_kernel(x, save, levels)
    assert torch.equal(code.codes, expected.codes)
    assert torch.equal(result, times_decoded(upstream, expected))
    assert code.codes.nbytes == (size if save == "uint8" else (size + 1) // 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("save", CODES)
@pytest.mark.parametrize("size", [2**24, 2**24 + 2, 2**24 + 129])  # halves that vectors may cross, and an odd number
def test_what_leaves_the_caches_has_the_same_bits(save, size, dtype):
    """Large results are stored past the caches, in memory that is asked for chunk by chunk."""
    x, upstream = torch.randn(2, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    levels = levels_of(get_surrogate("bsilu"), 1.67, save)

    def passes(x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, code = encode(x, save, levels)
        return y, times_decoded(upstream, code)

    with torch.no_grad():
        whole = passes(x, upstream)
        pieces = [passes(*both) for both in zip(x.split(2**20), upstream.split(2**20), strict=True)]
    assert torch.equal(whole[0], x.relu())
    for result, parts in zip(whole, zip(*pieces, strict=True), strict=True):
        assert torch.equal(result, torch.cat(parts))


@pytest.mark.parametrize("save", CODES)
def test_nan_has_a_code_and_only_nan(save):
    x = torch.tensor([torch.nan, -torch.nan, 1.0]).repeat(20)
    with torch.no_grad():
        y, code = encode(x, save, levels_of(get_surrogate("nelu"), 0.01, save))
        result = times_decoded(torch.ones_like(x), code)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(result.isnan(), x.isnan())


@pytest.mark.parametrize("width", [0.03, 0.1, 0.3, 1.0, 5.0])
@pytest.mark.parametrize(("save", "bound"), [("uint8", 0.015), ("uint4", 0.15)])
def test_a_surrogate_of_ones_own(save, bound, width, table):
    add_surrogate(Surrogate("bump", lambda x, alpha: 3 / (1 + (x / alpha) ** 2), alpha=width))
    x, upstream = torch.randn(2, 20_001, generator=torch.Generator().manual_seed(0))
    expected = 3 / (1 + (x / width) ** 2) * upstream
    assert (gradient(x, "bump", save, upstream) - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("save", CODES)
def test_a_derivative_without_bounds_is_refused(save, table):
    add_surrogate(Surrogate("square", lambda x, alpha: 2 * x))
    with pytest.raises(
        ValueError, match="whose derivative is bounded, which that of 'square' is not; use save='exact'"
    ):
        sugar(torch.randn(3, requires_grad=True), "square", save=save)


@pytest.mark.parametrize("save", CODES)
def test_a_new_surrogate_under_an_old_name_has_its_own_levels(save, table):
    x = torch.tensor([1.0, 2.0])
    for slope in (1.0, 7.0):
        add_surrogate(Surrogate("line", lambda x, alpha, slope=slope: torch.full_like(x, slope)))
        torch.testing.assert_close(gradient(x, "line", save, torch.ones(2)), torch.full((2,), slope))
