"""Compile elementwise bodies with Inductor at first use; where that cannot be done, run them as they are written.

A source file in C++ is compiled the same way, by Inductor's choice of compiler and flags, and kept in its cache.

`torch.compile` itself is not used: it guards every call on global state (grad mode, autocast, thread count, ...),
recompiles when that changes, and gives up with an error in the user's backward after eight times. A kernel here is
traced once with a symbolic length and called without guards.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import CDLL
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..surrogates import Surrogate
from .cheaper import Cheaper

_logger = logging.getLogger("timm_sugar")
_lock = threading.RLock()

# Inductor takes the length of the example for typical when it decides whether a loop is worth its threads.
_EXAMPLE_LENGTH = 1 << 20


def is_plain(*tensors: Tensor) -> bool:
    """Whether a kernel may read the memory of `tensors` here: eager mode, nothing recorded, traced or transformed."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not is_transformed()
        and all(
            type(x) is Tensor
            and x.device.type in ("cpu", "cuda")
            and x.layout is torch.strided
            and not x.is_neg()
            and not torch._C._functorch.is_legacy_batchedtensor(x)
            for x in tensors
        )
    )


def is_transformed() -> bool:
    """Whether a `torch.func` transform or a forward-mode level is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def flat(x: Tensor) -> Tensor:
    """View the memory of a dense tensor as one dimension, whatever the order of its own."""
    return x.as_strided((x.numel(),), (1,))


def run(
    body: Callable[..., None],
    surrogate: Surrogate | None,
    tensors: Sequence[Tensor],
    constants: Sequence[float] = (),
    table: tuple[float, ...] = (),
) -> None:
    """Call ``body(surrogate, *tensors, *constants)``, or with `table` at the end, compiled if possible.

    Args:
        body: Writes the result of an elementwise computation into some of its tensors with `copy_` and returns
            nothing. One kernel is compiled for each body, surrogate, list of dtypes, number of constants, length of
            the table and device; it serves any length and any constants.
        surrogate: The entry of the table that the body computes with, or None where it needs none.
        tensors: 1-D contiguous, all of one length, at least 1.
        constants: Numbers. The body receives each as a 1-D tensor in the `opmath` dtype of the first tensor.
        table: Numbers that the body looks up: one 1-D tensor, of the same dtype.
    """
    dtypes = tuple(x.dtype for x in tensors)
    device = tensors[0].device
    lists = [*((value,) for value in constants), *([table] if table else [])]
    values = [_constant(value, opmath_dtype(dtypes[0]), device) for value in lists]
    key = (body, surrogate, dtypes, tuple(map(len, lists)), device)
    if key not in _kernels:
        with _lock:
            if key not in _kernels:
                _kernels[key] = _compile_or_none(*key)
    kernel = _kernels[key]
    if kernel is None:
        body(surrogate, *tensors, *values)
    else:
        kernel(*tensors, *values)


def opmath(x: Tensor) -> Tensor:
    """Return x in the dtype that it is computed in."""
    return x.to(opmath_dtype(x.dtype))


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that `dtype` is computed in: float32 for the 16-bit ones."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Kept, so that nothing is transferred at every step.
    return torch.tensor(values, dtype=dtype, device=device)


_kernels: dict[tuple[Any, ...], Callable[..., None] | None] = {}
_libraries: dict[Path, CDLL | None] = {}


def _compile_or_none(
    body: Callable[..., None],
    surrogate: Surrogate | None,
    dtypes: tuple[torch.dtype, ...],
    lengths: tuple[int, ...],
    device: torch.device,
) -> Callable[..., None] | None:
    name = f"{body.__name__}({surrogate.name if surrogate else ''})"
    _logger.info("compiling %s for %s on %s, once", name, str(dtypes[0]).removeprefix("torch."), device)
    try:
        return _compile(partial(body, surrogate), dtypes, lengths, device)
    except Exception as error:  # no compiler, an Inductor without this entry, a derivative that cannot be traced
        _tell_why_not(error)
        return None


def _tell_why_not(error: Exception) -> None:
    reason = str(error).partition("\n")[0] or type(error).__name__
    _logger.info("not compiled, ATen operations are used instead: %s", reason)


def library(source: Path) -> CDLL | None:
    """Return a C++ file as a library, compiled for this processor if that was not done before; None where it cannot be.

    Its functions run without the interpreter's lock; their symbols are those that the file exports as C.
    """
    if source not in _libraries:
        with _lock:
            if source not in _libraries:
                _logger.info("compiling %s, once", source.name)
                try:
                    with _inductor_settings():
                        from torch._inductor.codecache import CppCodeCache

                        _libraries[source] = CppCodeCache.load(source.read_text(encoding="utf-8"))
                except Exception as error:  # no compiler, an Inductor without this entry
                    _tell_why_not(error)
                    _libraries[source] = None
    return _libraries[source]


def _compile(
    body: Callable[..., None], dtypes: tuple[torch.dtype, ...], lengths: tuple[int, ...], device: torch.device
) -> Callable[..., None]:
    def traced(*args: Tensor) -> tuple[()]:
        body(*args)
        return ()

    example: list[Any] = [torch.empty(_EXAMPLE_LENGTH, dtype=dtype, device=device) for dtype in dtypes]
    example += [torch.empty(length, dtype=opmath_dtype(dtypes[0]), device=device) for length in lengths]
    with torch.no_grad(), _inductor_settings():
        from torch._inductor import standalone_compile  # takes a second, hence not at import
        from torch.fx.experimental.proxy_tensor import make_fx

        graph = make_fx(traced, tracing_mode="symbolic")(*example)
        if device.type == "cpu":
            graph = make_fx(Cheaper(graph).run, tracing_mode="symbolic")(*example)
        return standalone_compile(graph, example, dynamic_shapes="from_graph")


@contextmanager
def _inductor_settings() -> Iterator[None]:
    # Inductor's own settings serve whole networks. For a kernel or two, building a precompiled header, starting worker
    # processes and probing instruction sets with test programs would take most of the time of a first step. The list
    # of instruction sets is dropped afterwards, so that the user's own torch.compile probes as always.
    _import_cpp_extension()
    from torch._inductor import config, cpu_vec_isa

    settings: dict[str, Any] = {"cpp_cache_precompile_headers": False, "compile_threads": 1, "cpp.vec_isa_ok": True}
    settings["cpp.enable_floating_point_contract_flag"] = "fast"  # multiply and add at once
    try:
        with config.patch(settings):
            yield
    finally:
        cpu_vec_isa.valid_vec_isa_list.cache_clear()


def _import_cpp_extension() -> None:
    # Inductor imports it, and at import it warns where there is a CUDA toolkit but no GPU.
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import torch.utils.cpp_extension  # noqa: F401
    finally:
        logger.setLevel(level)
