"""Kernels for the CPU: every surrogate and dtype against float64, first use, the cache, and what can fail in them."""

import math
import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from timm_sugar import list_surrogates, register_surrogate, sugar, surrogates
from timm_sugar.kernels import cpu
from timm_sugar.kernels.memory import may_read
from timm_sugar.surrogates import get_surrogate

ROOT = Path(__file__).parents[2]
X = torch.cat([torch.linspace(-30, 30, 200_001), torch.linspace(-1, 1, 20_001), torch.linspace(-1e4, 1e4, 2_001)])


def gradient(x, name, upstream=None, **kwargs):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(sugar(x, name, **kwargs), x, torch.ones_like(x) if upstream is None else upstream)[0]


@pytest.fixture
def own(monkeypatch):
    monkeypatch.setattr(surrogates, "_SURROGATES", dict(surrogates._SURROGATES))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 4e-7), (torch.float64, 1e-14)])
@pytest.mark.parametrize("name", list_surrogates())
def test_kernel_is_the_derivative(name, dtype, error):
    entry = get_surrogate(name)
    assert cpu.library(entry) is not None
    x = X.to(dtype)
    wanted = entry.derivative(x.double(), entry.alpha)
    assert (gradient(x, name).double() - wanted).abs().max() <= error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", list_surrogates())
def test_16_bits_are_rounded_once_from_float32(name, dtype):
    entry = get_surrogate(name)
    x = X.clamp(-1e4, 1e4).to(dtype)
    wanted = entry.derivative(x.double(), entry.alpha)
    error = (gradient(x, name).double() - wanted).abs()
    assert (error <= 0.51 * torch.finfo(dtype).eps * wanted.abs() + 1e-6).all()


FUNCTIONS = {
    "exp": lambda x, alpha: torch.exp(-x.abs()),
    "expm1": lambda x, alpha: -torch.expm1(-x.abs()),
    "log1p": lambda x, alpha: torch.log1p(1 / (1 + x * x)),
    "tanh": lambda x, alpha: torch.tanh(x),
    "erf": lambda x, alpha: torch.erf(x),
    "erfc": lambda x, alpha: torch.erfc(x),
    "sigmoid": lambda x, alpha: torch.sigmoid(alpha * x),
    "sqrt": lambda x, alpha: 1 / torch.sqrt(1 + x * x),
    "rsqrt": lambda x, alpha: torch.rsqrt(1 + x * x),
    "pow": lambda x, alpha: (1 + x * x) ** -1.5,
    "cube": lambda x, alpha: (x / (1 + x.abs())) ** 3,
    "clamp": lambda x, alpha: x.clamp(-0.3, 0.7),
    "clamp_min": lambda x, alpha: x.clamp(min=-0.3).clamp_max(0.5),
    "minimum": lambda x, alpha: torch.minimum(x, alpha * torch.ones_like(x)).maximum(-torch.ones_like(x)),
    "where": lambda x, alpha: torch.where((x > -1) & (x <= alpha), 1 - x.abs(), torch.zeros_like(x)),
    "or": lambda x, alpha: torch.where((x < -1) | ~(x < 1), 0.5, 1.0).to(x.dtype),
    "mask": lambda x, alpha: (x >= 0).to(x.dtype) * 0.5,
    "cosh": lambda x, alpha: 1 / torch.cosh(x.clamp(-20, 20)) ** 2,
    "atan": lambda x, alpha: torch.atan(x) / math.pi + 0.5,
    "sin": lambda x, alpha: torch.sin(x) * torch.cos(x),
    "sign": lambda x, alpha: torch.sign(x) - 0.5,
    "relu": lambda x, alpha: torch.relu(1 - (x / alpha).abs()),
    "rsub": lambda x, alpha: torch.rsub(torch.tanh(x), 1.0, alpha=0.25),
    "nan": lambda x, alpha: torch.where(torch.sqrt(x).isnan(), 0.0, 1 / (1 + x * x)),
    "not itself": lambda x, alpha: torch.where((y := torch.sin(x) / x) != y, 1.0, y),
    "bool": lambda x, alpha: 1 / (2.0 * (x > 0) + (x <= 0).to(x.dtype)),
    "sub": lambda x, alpha: torch.sub(1, torch.sigmoid(x), alpha=0.5),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_a_derivative_may_use(name, own):
    register_surrogate("own", FUNCTIONS[name], alpha=1.3)
    assert cpu.library(get_surrogate("own")) is not None
    for dtype, error in ((torch.float32, 5e-7), (torch.float64, 1e-13)):
        x = torch.cat([X, torch.tensor([math.nan])]).to(dtype)
        result = gradient(x, "own").double()
        wanted = FUNCTIONS[name](x.double(), 1.3 if dtype == torch.float64 else torch.tensor(1.3).item())
        wanted = torch.where(x.isnan(), math.nan, wanted)  # also where the formula says another value
        torch.testing.assert_close(result, wanted, rtol=0, atol=error, equal_nan=True)


def test_alpha_is_an_argument_of_one_library(own, caplog):
    register_surrogate("own", lambda x, alpha: alpha * torch.sigmoid(x), alpha=1.0)
    with caplog.at_level("INFO", logger="timm_sugar"):
        for alpha in (1.0, 2.5, -3.0):
            x = torch.randn(7)
            torch.testing.assert_close(gradient(x, "own", alpha=alpha), alpha * torch.sigmoid(x))
    said = [record.getMessage() for record in caplog.records]
    assert said in ([], ["compiling the derivative of own, once"])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [1, 7, 16_384, 32_769, 100_003])
def test_sizes_and_threads(size, threads):
    x, upstream = torch.randn(2, size, generator=torch.Generator().manual_seed(size))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = gradient(x, "silu", upstream)
    finally:
        torch.set_num_threads(before)
    F.silu(y := x.clone().requires_grad_()).backward(upstream)
    torch.testing.assert_close(result, y.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("start", [0, 1])  # on the boundary of a vector, and not
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_leaves_the_caches_has_the_same_bits(dtype, start, threads):
    """Large results are stored past the caches, in memory that is asked for chunk by chunk."""
    multiply = cpu.exact(get_surrogate("bsilu"), dtype)
    count = 2**25 // dtype.itemsize + 1_000_003
    x, upstream = (
        torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).to(dtype).repeat(1, count // 1000 + 1)
    )
    out = torch.empty(count + 1, dtype=dtype)[start : start + count]
    small = torch.empty(1000, dtype=dtype)
    multiply(upstream.data_ptr(), x.data_ptr(), out.data_ptr(), count, 1.67, threads)
    multiply(upstream.data_ptr(), x.data_ptr(), small.data_ptr(), 1000, 1.67, 1)
    assert torch.equal(out, small.repeat(count // 1000 + 1)[:count])


def test_a_derivative_without_a_cpp_form_is_composed_and_said_once(own, caplog, monkeypatch):
    monkeypatch.setattr(cpu, "_said", set())  # another test of this process may have heard it
    register_surrogate("own", lambda x, alpha: torch.special.i0e(x))
    x = torch.randn(5)
    for _ in range(2):
        torch.testing.assert_close(gradient(x, "own"), torch.special.i0e(x))
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == [
        "the derivative of own: no kernel, composed operations are used, right but slower: special_i0e has no C++ form"
    ]


def test_plain_tensors_only():
    x = torch.randn(3)
    with torch.no_grad():
        assert may_read(x)
        assert not may_read(x.to("meta"))
        assert not may_read(x.to_sparse())
        assert not may_read(torch._neg_view(x))
        assert not may_read(torch._efficientzerotensor(3))
        assert not may_read(x, torch.nested.nested_tensor([x, x], layout=torch.jagged))
    assert not may_read(x)


# In processes of their own: the compiler, and the cache on disk.

USE = """
import logging, sys; logging.basicConfig(format="%(levelname)s %(message)s")
import torch, timm_sugar
from timm_sugar.surrogates import get_surrogate
x = torch.linspace(-4, 4, 1001).requires_grad_()
wanted = get_surrogate("bsilu").derivative(x.detach().double(), 1.67)
for save, tolerance in (("exact", 1e-6), ("uint8", 0.01)):
    for _ in range(2):
        (result,) = torch.autograd.grad(timm_sugar.sugar(x, save=save).sum(), x)
        assert (result - wanted).abs().max() < tolerance
from timm_sugar.kernels import gradient_path
print(gradient_path("bsilu"), gradient_path("bsilu", save="uint8"))
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    return result


def warnings_of(result: subprocess.CompletedProcess) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("WARNING")]


def composed(result: subprocess.CompletedProcess, reason: str, times: int = 1) -> None:
    """Right by composed operations, and the reason said once."""
    assert result.stdout.strip() == "composed composed"
    said = warnings_of(result)
    assert len(said) == times
    assert all(re.search(reason, line) for line in said), said


def test_importing_compiles_nothing_and_loads_no_compiler(tmp_path):
    code = """
    import sys, timm
    before = set(sys.modules)
    import timm_sugar
    new = set(sys.modules) - before
    assert not [m for m in new if m.startswith(("torch._inductor", "torch._dynamo", "triton", "transformers"))], new
    import torch
    x = torch.randn(9, requires_grad=True)
    timm_sugar.sugar(x).sum().backward()
    new = set(sys.modules) - before
    assert not [m for m in new if m.startswith(("torch._inductor", "torch._dynamo"))], new
    """
    run_python(code, TIMM_SUGAR_CACHE=str(tmp_path))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """A cache folder that one process has filled."""
    folder = tmp_path_factory.mktemp("libraries")
    first = run_python(USE, TIMM_SUGAR_CACHE=str(folder))
    assert (first.stdout.strip(), warnings_of(first)) == ("cpp cpp", [])
    return folder


def test_compiled_once_and_kept(libraries):
    made = {path.name: path.stat().st_mtime_ns for path in libraries.iterdir()}
    assert len(made) == 2
    assert all(name.endswith(".so") for name in made)
    assert run_python(USE, TIMM_SUGAR_CACHE=str(libraries)).stdout.strip() == "cpp cpp"
    assert {path.name: path.stat().st_mtime_ns for path in libraries.iterdir()} == made


def test_many_processes_at_once(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        results = [*pool.map(lambda _: run_python(USE, TIMM_SUGAR_CACHE=str(tmp_path)), range(4))]
    assert [result.stdout.strip() for result in results] == ["cpp cpp"] * 4
    assert len([*tmp_path.iterdir()]) == 2


def test_another_processor_or_other_flags_have_libraries_of_their_own(libraries, tmp_path):
    shutil.copytree(libraries, tmp_path, dirs_exist_ok=True)
    run_python(USE, TIMM_SUGAR_CACHE=str(tmp_path), TIMM_SUGAR_CXXFLAGS="-O1")
    other = f"from timm_sugar.kernels import cpu\ncpu.processor = lambda: 'another'\n{USE}"
    run_python(other, TIMM_SUGAR_CACHE=str(tmp_path))
    assert len([*tmp_path.iterdir()]) == 6


def test_no_compiler(tmp_path):
    result = run_python(USE, TIMM_SUGAR_CACHE=str(tmp_path), PATH=str(tmp_path), CXX="", CC="")
    composed(result, r"no C\+\+ compiler; install g\+\+ or clang\+\+, or name one in CXX")


@pytest.mark.parametrize("variable", ["CXX", "CC"])
def test_a_broken_compiler(tmp_path, variable):
    environment = {"CXX": "", "CC": "", variable: "/bin/false"}
    composed(run_python(USE, TIMM_SUGAR_CACHE=str(tmp_path), **environment), "/bin/false failed with status 1")
    assert not [*tmp_path.iterdir()]


def test_a_compiler_that_says_why(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'disk quota exceeded' >&2\nexit 3\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    result = run_python(USE, TIMM_SUGAR_CACHE=str(tmp_path / "cache"), CXX=str(compiler))
    composed(result, "compiler failed with status 3: disk quota exceeded")


def test_a_cache_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    composed(run_python(USE, TIMM_SUGAR_CACHE=str(tmp_path / "file" / "cache")), "Not a directory")


@pytest.mark.parametrize("damage", ["cut short", "altered", "empty"])
def test_a_damaged_library_is_not_loaded(libraries, tmp_path, damage):
    shutil.copytree(libraries, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes({"cut short": content[: len(content) // 2], "altered": content, "empty": b""}[damage])
    composed(
        run_python(USE, TIMM_SUGAR_CACHE=str(tmp_path)),
        r"\.so is damaged; remove it, and it is compiled again",
        times=2,
    )
