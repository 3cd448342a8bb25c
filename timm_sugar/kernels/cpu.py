"""Kernels for the CPU: kernels.cpp, compiled by the host's compiler at first use and cached on disk."""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from ctypes import CDLL, c_double, c_int, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..files import cache_folder
from ..surrogates import Surrogate
from .expression import derivative_source

_logger = logging.getLogger("timm_sugar")
_lock = threading.Lock()
_libraries: dict[Surrogate | None, CDLL | None] = {}
_exact: dict[tuple[Surrogate, torch.dtype], Any] = {}
_said: set[str] = set()
_SOURCE = Path(__file__).with_name("kernels.cpp")
# Without the last two, loops with exponentials or comparisons do not vectorise.
_FLAGS = [
    "-x",
    "c++",
    "-std=c++17",
    "-O3",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-fno-exceptions",
    "-fno-math-errno",
    "-fno-trapping-math",
]
_FLAGS_OF_EXACT = ["-ffinite-math-only", "-fno-signed-zeros"]
_ARGUMENTS = {  # signatures of the functions in kernels.cpp
    "multiply": [c_void_p, c_void_p, c_void_p, c_int64, c_double, c_int],
    "encode": [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int],
    "decode": [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int],
}


def library(surrogate: Surrogate | None) -> CDLL | None:
    """Return the library of a surrogate's exact kernels, or, for None, of lean saving; None if compiling fails.

    The reason for a failure is logged once, at WARNING. The functions release the GIL.
    """
    try:
        return _libraries[surrogate]
    except KeyError:
        pass
    with _lock:
        if surrogate not in _libraries:
            name = f"the derivative of {surrogate.name}" if surrogate else "lean saving"
            try:
                _libraries[surrogate] = _load(_source(surrogate), [] if surrogate is None else _FLAGS_OF_EXACT, name)
            except Exception as error:
                _libraries[surrogate] = None
                tell_why_not(name, error)
    return _libraries[surrogate]


def exact(surrogate: Surrogate, dtype: torch.dtype) -> Any:
    """Return the exact kernel of a surrogate for a dtype, a C function; None if it cannot be compiled."""
    try:
        return _exact[surrogate, dtype]
    except KeyError:
        found = library(surrogate)
        _exact[surrogate, dtype] = found and getattr(found, f"multiply_{str(dtype)[6:]}")
        return _exact[surrogate, dtype]


def tell_why_not(name: str, error: Exception) -> None:
    """Log at WARNING why there is no kernel, so that composed operations are used: correct, but slower.

    Each reason is logged once.
    """
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if reason not in _said:
        _said.add(reason)
        _logger.warning("%s: no kernel, composed operations are used, right but slower: %s", name, reason)


def _source(surrogate: Surrogate | None) -> str:
    text = _SOURCE.read_text(encoding="utf-8")
    if surrogate is None:
        return text
    for name, dtype in (("DOUBLE", torch.float64), ("FLOAT", torch.float32)):
        statements, result = derivative_source(surrogate, dtype)
        text = f"#define DERIVATIVE_{name} {statements} return {result};\n{text}"
    return text


def _load(source: str, flags: list[str], name: str) -> CDLL:
    compiler = _compiler()
    flags = [*_FLAGS, *flags, *os.environ.get("TIMM_SUGAR_CXXFLAGS", "-march=native").split()]
    key = hashlib.sha256("\0".join([source, *_version(compiler), *flags, processor()]).encode()).hexdigest()
    folder = cache_folder()
    path = folder / f"{key[:32]}.so"
    if not path.exists():
        _logger.info("compiling %s, once", name)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="compiling-") as work:
            made = Path(work, path.name)
            done = subprocess.run(
                [*compiler, *flags, "-", "-o", str(made)], input=source, capture_output=True, text=True, timeout=300
            )
            if done.returncode or not made.exists():
                said = done.stderr.strip().partition("\n")[0]
                raise OSError(f"{' '.join(compiler)} failed with status {done.returncode}{said and ': '}{said}")
            # A hash is appended, which the loader ignores; it detects a truncated or modified file.
            CDLL(str(made))  # raises before the file is cached
            content, kept = made.read_bytes(), Path(work, "kept")
            kept.write_bytes(content + hashlib.sha256(content).digest())
            os.replace(kept, path)
    content = path.read_bytes()
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise OSError(f"{path} is damaged; remove it, and it is compiled again")
    return _declared(CDLL(str(path)))


def _declared(found: CDLL) -> CDLL:
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        for name in (
            f"multiply_{dtype}",
            *(f"{way}code_{n}_{dtype}" for way in ("en", "de") for n in ("uint8", "uint4")),
        ):
            function = getattr(found, name, None)
            if function is not None:
                function.argtypes, function.restype = _ARGUMENTS[name.partition("_")[0]], None
    return found


def _compiler() -> list[str]:
    for name in ("CXX", "CC"):
        if command := os.environ.get(name, "").split():
            return command
    found = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if found is None:
        raise OSError("no C++ compiler; install g++ or clang++, or name one in CXX")
    return [found]


@lru_cache
def _version_of(*compiler: str) -> str:
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60).stdout


def _version(compiler: list[str]) -> list[str]:
    return [*compiler, _version_of(*compiler)]


@lru_cache
def processor() -> str:
    """Return the properties of the processor that affect the compiled code: its model and instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        wanted = ("model name", "flags", "Features", "CPU part")
        told = [next((line for line in lines if line.startswith(name)), "") for name in wanted]
    except OSError:
        told = [platform.processor()]
    return "\n".join([platform.machine(), platform.system(), *told])
