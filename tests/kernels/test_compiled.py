"""First use of the kernels: nothing at import, every shape and dtype, no compiler, and no more kernels than needed."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from timm_sugar import sugar
from timm_sugar.kernels import compiled

ROOT = Path(__file__).parents[2]

FIRST_USE = """
import warnings; warnings.simplefilter("error")
import torch, timm_sugar
from timm_sugar.surrogates import get_surrogate
bsilu = get_surrogate("bsilu")
SHAPES = [(), (0,), (1,), (7,), (0, 3), (1, 1, 1), (3, 5), (2, 3, 5), (2, 3, 4, 5), (1, 2, 3, 2, 3), (3, 1, 2, 1, 2, 5)]
for save, tolerance in (("exact", 0.0), ("uint8", 0.009), ("uint4", 0.085)):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for shape in SHAPES:
            x = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
            y = timm_sugar.sugar(x, save=save)
            upstream = torch.randn_like(y)
            (result,) = torch.autograd.grad(y, x, upstream)
            expected = upstream.double() * bsilu.derivative(x.detach().double(), 1.67)
            bound = (tolerance + 2 * torch.finfo(dtype).eps + 2e-6) * upstream.double().abs() * 1.3
            assert result.shape == x.shape and result.dtype == dtype and torch.equal(y, torch.relu(x))
            assert ((result.double() - expected).abs() <= bound + 1e-7).all(), (save, dtype, shape)
from timm_sugar.kernels import compiled
built = [kernel is not None for kernel in (*compiled._kernels.values(), *compiled._libraries.values())]
print(len(built), all(built), any(built))
"""


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.slow
def test_first_use_of_every_dtype_rank_and_size_in_one_process():
    # exact: one kernel for each dtype; lean: one library
    assert run_python(FIRST_USE) == "5 True True"


def test_no_compiler_on_the_path(tmp_path):
    environment = {"PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment |= {name: "" for name in ("CXX", "CC") if name in os.environ}
    assert run_python(FIRST_USE, **environment) == "5 False False"


def test_importing_compiles_nothing_and_loads_no_compiler():
    code = """
    import sys, timm
    before = set(sys.modules)
    import timm_sugar
    from timm_sugar.kernels import compiled
    new = set(sys.modules) - before
    assert not [m for m in new if m.startswith(("torch._inductor", "torch._dynamo", "transformers"))], new
    print(len(compiled._kernels))
    """
    assert run_python(code) == "0"


def test_one_log_line_and_one_kernel_for_any_alpha_and_shape(caplog, monkeypatch):
    monkeypatch.setattr(compiled, "_kernels", {})
    built = []
    monkeypatch.setattr(compiled, "_compile", lambda body, *_: built.append(body) or (lambda *args: body(*args)))
    with caplog.at_level("INFO", logger="timm_sugar"):
        for alpha in (1.67, 0.5, 2.0):
            for shape in ((4,), (2, 3), (1,)):
                x = torch.randn(shape, requires_grad=True)
                sugar(x, alpha=alpha).sum().backward()
    assert len(built) == 1
    assert [r.getMessage() for r in caplog.records] == ["compiling write_product(bsilu) for float32 on cpu, once"]


def test_a_derivative_that_cannot_be_traced_runs_as_written(monkeypatch):
    from timm_sugar import surrogates

    monkeypatch.setattr(surrogates, "_SURROGATES", dict(surrogates._SURROGATES))
    monkeypatch.setattr(compiled, "_kernels", {})

    def by_value(x, alpha):
        return torch.where(x > 0, 1.0, alpha) if x.sum() > 1e9 or alpha < 5 else x

    surrogates.add_surrogate(surrogates.Surrogate("by_value", by_value, alpha=0.25))
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    sugar(x, "by_value").sum().backward()
    assert x.grad.tolist() == [0.25, 1.0]
    assert list(compiled._kernels.values()) == [None]


def test_plain_tensors_only():
    x = torch.randn(3)
    with torch.no_grad():
        assert compiled.is_plain(x)
        assert not compiled.is_plain(x.to("meta"))
        assert not compiled.is_plain(x.to_sparse())
        assert not compiled.is_plain(torch._neg_view(x))
    assert not compiled.is_plain(x)
