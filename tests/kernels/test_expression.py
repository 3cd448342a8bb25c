"""Derivatives as C++: what is printed, what is refused, and that it is the derivative, in float and in double."""

import math

import pytest
import torch

from timm_sugar.kernels.expression import UnknownOperation, derivative_source
from timm_sugar.surrogates import Surrogate


def printed(derivative, dtype=torch.float32, alpha=1.0):
    return derivative_source(Surrogate("own", derivative, alpha=alpha), dtype)


def test_statements_and_an_expression():
    assert printed(lambda x, alpha: alpha * torch.exp(x)) == ("const T v0 = exp(x); const T v1 = alpha * v0;", "v1")
    assert printed(lambda x, alpha: torch.where(x > 0, 1.0, alpha * x)) == (
        "const bool v0 = x > T(0); const T v1 = alpha * x; const T v2 = v0 ? T(1.0) : v1;",
        "v2",
    )
    assert printed(lambda x, alpha: x**2) == ("const T v0 = x * x;", "v0")


def test_the_formula_may_depend_on_the_dtype():
    def derivative(x, alpha):
        return x * torch.finfo(x.dtype).eps

    assert repr(torch.finfo(torch.float32).eps) in printed(derivative, torch.float32)[0]
    assert repr(torch.finfo(torch.float64).eps) in printed(derivative, torch.float64)[0]


@pytest.mark.parametrize(
    ("derivative", "name"),
    [
        (lambda x, alpha: x - x.mean(), "mean"),
        (lambda x, alpha: torch.special.i0e(x), "special_i0e"),
        (lambda x, alpha: x.half().float(), "_to_copy with a result of torch.float16"),
        (lambda x, alpha: x if alpha > 1 else -x, "_local_scalar_dense"),
        (lambda x, alpha: x.flip(0), "flip"),
        (lambda x, alpha: torch.div(x, 0.5, rounding_mode="floor"), r"div\(rounding_mode\)"),
        (lambda x, alpha: torch.where(x > 88, math.inf, x), "the constant inf"),
    ],
)
def test_what_is_not_known_is_named(derivative, name):
    with pytest.raises(UnknownOperation, match=name):
        printed(derivative)
