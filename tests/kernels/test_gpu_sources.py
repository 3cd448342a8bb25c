"""Kernels for GPUs, without one: they compile for each architecture, and compute what is wanted."""

import ctypes
import glob
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from timm_sugar import list_surrogates
from timm_sugar.kernels import cuda
from timm_sugar.surrogates import get_surrogate

ROOT = Path(__file__).parents[2]
SOURCES = {torch.float32: "float", torch.float64: "double"}
# Elsewhere than in torch's wheels for Linux there may be neither; there the kernels are composed operations anyway.
LINUX = sys.platform == "linux"


@pytest.fixture(scope="module")
def nvrtc():
    found = [path for folder in sys.path for path in glob.glob(f"{folder}/nvidia/**/libnvrtc.so.*", recursive=True)]
    if not found and torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA")
    return ctypes.CDLL(found[0])


def compile_with_nvrtc(nvrtc, source: str, architecture: int) -> str:
    """Compile as jiterator does and return PTX."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    options = (ctypes.c_char_p * 2)(f"--gpu-architecture=compute_{architecture}".encode(), b"-default-device")
    status = nvrtc.nvrtcCompileProgram(program, 2, options)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    return ptx.value.decode()


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("name", list_surrogates())
def test_jiterator_sources_compile(nvrtc, name, dtype, architecture):
    kind = SOURCES[dtype]
    source = cuda.exact_source(get_surrogate(name), dtype)
    kernel = f'extern "C" __global__ void k({kind}* x, {kind} a) {{ *x = sugar_{name}_{kind}<{kind}>(x[0], x[1], a); }}'
    ptx = compile_with_nvrtc(nvrtc, f"{source}\n{kernel}", architecture)
    assert (".f64" in ptx) == (dtype == torch.float64)  # nothing of the float kernel is computed in double


@pytest.mark.parametrize("dtype", SOURCES)
def test_jiterator_sources_are_the_derivatives(dtype, tmp_path):
    """The same text through the host's compiler and C library."""
    kind = SOURCES[dtype]
    text = "#include <cmath>\nusing namespace std;\n"
    for name in list_surrogates():
        text += f"{cuda.exact_source(get_surrogate(name), dtype)}\n"
        text += f'extern "C" void {name}(const {kind}* x, {kind}* out, long count, {kind} alpha) {{ '
        text += f"for (long i = 0; i < count; i++) out[i] = sugar_{name}_{kind}<{kind}>(x[i], 1, alpha); }}\n"
    (tmp_path / "kernels.cpp").write_text(text)
    command = ["g++", "-O2", "-shared", "-fPIC", "-o", str(tmp_path / "kernels.so"), str(tmp_path / "kernels.cpp")]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(tmp_path / "kernels.so"))
    x = torch.cat([torch.linspace(-40, 40, 100_001), torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])]).to(dtype)
    number = ctypes.c_float if dtype == torch.float32 else ctypes.c_double
    for name in list_surrogates():
        entry, out = get_surrogate(name), torch.empty_like(x)
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, out))
        getattr(library, name)(*pointers, ctypes.c_long(x.numel()), number(entry.alpha or 0.0))
        wanted = entry.derivative(x.double(), entry.alpha)
        error = 4e-7 if dtype == torch.float32 else 1e-14
        torch.testing.assert_close(
            out.double(), wanted, rtol=0, atol=error, equal_nan=True, msg=lambda m, n=name: n + m
        )


INTERPRETED = """
import torch
from timm_sugar.kernels import lean_triton
from timm_sugar.kernels.lean import encode, levels_of, times_decoded
from timm_sugar.surrogates import get_surrogate
special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf])
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for save in ("uint8", "uint4"):
        levels = levels_of(get_surrogate("bsilu"), 1.67, save)
        encoder, table = (torch.tensor(part, dtype=wide) for part in (levels.encoder, levels.table))
        for shape in ((1,), (2,), (7,), (1023,), (1025,), (2, 3, 5, 7), (5, 8, 130)):
            x, grad = torch.randn(2, *shape).to(dtype)
            x.view(-1)[: len(special)] = special[: x.numel()].to(dtype)
            if len(shape) == 4:
                x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
            with torch.no_grad():
                y, code = encode(x, save, levels)
                out = times_decoded(grad, code)
            made = [torch.empty_like(x), torch.empty_like(code.codes), torch.empty_like(x)]
            lean_triton.encode(x, made[0], made[1], encoder, save)
            lean_triton.decode(grad, made[2], made[1], table, save)
            rounding = 1e-2 if dtype == torch.bfloat16 else 0.0  # the interpreter truncates to bfloat16
            assert torch.equal(made[1], code.codes), (dtype, save, shape)
            torch.testing.assert_close(made[0], y, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(made[2], out, rtol=rounding, atol=0, equal_nan=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="there is no Triton for this system")
def test_triton_kernels_in_its_interpreter():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


COMPILED = """
import re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from timm_sugar.kernels import lean_triton
targets = [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32)]
if triton.__version__ >= "3.5":  # before, ROCm's own linker is needed
    targets.append(GPUTarget("hip", "gfx942", 64))
for target in targets:
    for kernel in (f"_{way}code_{save}" for way in ("en", "de") for save in ("uint8", "uint4")):
        for dtype, wide in (("fp16", "fp32"), ("bf16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64")):
            function = getattr(lean_triton, kernel)
            pointers = (f"*{dtype}", f"*{dtype}", "*u8", f"*{wide}")
            signature = dict(zip(function.arg_names, (*pointers, "i64", "i64", "constexpr"), strict=True))
            made = triton.compile(ASTSource(function, signature=signature, constexprs={"BLOCK": 1024}), target=target)
            offsets = re.findall(r"tt.addptr .*: tensor<1024x!tt.ptr<(\\w+)>>, tensor<1024x(i\\d+)>", made.asm["ttir"])
            memory = [width for element, width in offsets if not (element == wide.replace("p", "") and width == "i32")]
            assert len(memory) >= 3 and set(memory) == {"i64"}, (kernel, dtype, offsets)
"""


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="there is no Triton for this system")
def test_triton_kernels_compile_and_count_in_64_bits(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    code = textwrap.dedent(COMPILED)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


VECTORS = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from timm_sugar.kernels import lean_triton
for kernel in (f"_{way}code_{save}" for way in ("en", "de") for save in ("uint8", "uint4")):
    function = getattr(lean_triton, kernel)
    kinds = ("*bf16", "*bf16", "*u8", "*fp32", "i32", "i32", "constexpr")
    signature = dict(zip(function.arg_names, kinds, strict=True))
    multiples_of_16 = {(i,): [["tt.divisibility", 16]] for i in range(6)}
    source = ASTSource(function, signature=signature, constexprs={"BLOCK": 1024}, attrs=multiples_of_16)
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    parts = 1 if "uint8" in kernel else 2
    for access in ("ld", "st"):  # 8 elements of 2 bytes at once, of each part
        assert len(re.findall(rf"{access}\\.global[.\\w:]*v4\\.b32", text)) == parts, (kernel, access)
    assert not re.search(r"(ld|st)\\.global[.\\w:]*\\.b(8|16)", text), kernel
"""


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="there is no Triton for this system")
def test_triton_kernels_read_and_write_vectors(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", VECTORS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Memory:
    """What a launch asks of a tensor on a GPU."""

    is_cuda = True

    def __init__(self, count: int, dtype: torch.dtype, address: int = 512):
        self.count, self.dtype, self.address = count, dtype, address
        self.device = torch.device("cuda", 0)

    def numel(self) -> int:
        return self.count

    def data_ptr(self) -> int:
        return self.address


@pytest.mark.skipif(not LINUX, reason="there is no Triton for this system")
def test_triton_looks_for_a_kernel_once_where_it_has_one_for_all(monkeypatch):
    lean_triton = cuda.lean()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(lean_triton, "_compiled", {})
    seen = []

    class Kernel:
        def __init__(self, name: str):
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]):
            def launch(*arguments):
                seen.append((self.name, grid[0], arguments[4:]))
                return None if self.name == "interpreted" else Kernel("found")

            return launch

    def names(source: Memory, codes: int, kernel: Kernel) -> list[str]:
        seen.clear()
        target = Memory(source.count, source.dtype)
        for _ in range(2):
            lean_triton._launch(kernel, source, target, Memory(codes, torch.uint8), Memory(8, torch.float32))
        assert seen[0][1:] == seen[1][1:] == (-(-codes // 1024), (codes, source.count // 2, 1024))
        return [name for name, *_ in seen]

    kernel = Kernel("sought")
    assert names(Memory(4096, torch.float32), 4096, kernel) == ["sought", "found"]
    assert names(Memory(1 << 20, torch.float32), 1 << 20, kernel) == ["found", "found"]
    assert names(Memory(4096, torch.bfloat16), 4096, kernel) == ["sought", "found"]
    assert names(Memory(4096, torch.float32), 4096, Kernel("sought")) == ["sought", "found"]
    assert names(Memory(4096, torch.float32), 4096, Kernel("interpreted")) == ["interpreted"] * 2
    for unusual in (Memory(4096, torch.float32, 516), Memory(4100, torch.float32), Memory(1 << 31, torch.float32)):
        assert names(unusual, unusual.count, kernel) == ["sought", "sought"], vars(unusual)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert names(Memory(4096, torch.float32), 4096, kernel) == ["sought", "sought"]
