"""The cheaper exponential and clamp: error, limits, NaN, and what is left alone."""

import math
from functools import partial

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from timm_sugar.kernels.cheaper import Cheaper
from timm_sugar.surrogates import get_surrogate, list_surrogates

SPECIAL = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 3e38, -3e38, 200.0, -200.0])


def cheaper(function, x: torch.Tensor) -> torch.Tensor:
    result = Cheaper(make_fx(function)(x)).run(x)
    assert result.dtype == x.dtype
    return result


def test_the_relative_error_of_the_exponential():
    x = torch.linspace(-10, 10, 200_001)
    exact = x.double().exp()
    assert ((cheaper(torch.exp, x).double() - exact) / exact).abs().max() < 7e-7
    assert cheaper(torch.exp, torch.zeros(1)).item() == 1.0


@pytest.mark.parametrize(
    "function",
    [
        torch.exp,
        torch.sigmoid,
        lambda x: x.clamp(-2.0, 3.0),
        lambda x: x.clamp(min=-2.0),
        lambda x: x.clamp(max=3.0),
        lambda x: torch.exp(x.clamp(-1024.0, 48.0)),
        lambda x: torch.exp(x.clamp(max=0)),
        lambda x: torch.exp(-x * x),
    ],
)
def test_limits_and_nan(function):
    x = torch.cat([SPECIAL, torch.linspace(-87, 88, 1001)])
    torch.testing.assert_close(cheaper(function, x), function(x), rtol=1e-5, atol=2e-38, equal_nan=True)


def test_float64_is_left_alone():
    x = torch.linspace(-10, 10, 1001).double()
    assert torch.equal(cheaper(torch.exp, x), torch.exp(x))


def test_a_derivative_is_that_of_the_surrogate():
    x = torch.linspace(-30, 30, 60_001)
    for name in list_surrogates():
        entry = get_surrogate(name)
        found = cheaper(partial(entry.derivative, alpha=entry.alpha), x)
        exact = entry.derivative(x.double(), entry.alpha)
        assert (found.double() - exact).abs().max() < 1e-6, name
