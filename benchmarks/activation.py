"""Forward and backward of single activations against nn.ReLU, by tensor size, with two memory allocators.

    python benchmarks/activation.py --output activation.json
    python benchmarks/activation.py --sizes 1e6 1.6e7 --only relu gelu sugar_bsilu
    TIMM_SUGAR_CXXFLAGS='-mavx2 -mfma' ATEN_CPU_CAPABILITY=avx2 python benchmarks/activation.py   # without AVX-512
    python benchmarks/activation.py --device cuda --dtype bfloat16

Each figure is the median over shuffled rounds, in microseconds for one forward and backward of a tensor. The input of
the activation is the result of another operation, as in a network, so that nn.ReLU(inplace=True) can be measured. On a
GPU the GPU time (CUDA events) and the host time (on a tensor of 1024 elements) are reported separately.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ALLOCATORS, environment, print_table, run_self, write_json
from torch import Tensor, nn

from timm_sugar import Sugar, forward_gradient_injection, list_surrogates
from timm_sugar.analysis.speed import time_shuffled
from timm_sugar.surrogates import get_surrogate


def fgi_direct(x: Tensor) -> Tensor:
    bsilu = get_surrogate("bsilu")
    m = x * bsilu.derivative(x, bsilu.alpha).detach()
    return m - m.detach() + torch.relu(x).detach()


CONTESTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.ReLU(),
    "relu_inplace": nn.ReLU(inplace=True),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "elu": nn.ELU(),
    "selu": nn.SELU(),
    "mish": nn.Mish(),
    "leaky_relu": nn.LeakyReLU(),
    "fgi_direct": fgi_direct,
    "fgi_indirect": lambda x: forward_gradient_injection(x, torch.relu, "bsilu"),
    **{f"sugar_{name}": Sugar(name) for name in list_surrogates()},
    **{f"sugar_{name}_{save}": Sugar(name, save=save) for name in ("bsilu", "nelu") for save in ("uint8", "uint4")},
}


def step(activation: Callable[[Tensor], Tensor], leaf: Tensor, grad: Tensor) -> float:
    """Return the seconds for the forward and backward of one activation on a clone of a leaf."""
    x = leaf.clone()
    start = time.perf_counter()
    y = activation(x)
    del x
    (result,) = torch.autograd.grad(y, leaf, grad)
    del y, result
    return time.perf_counter() - start


def time_on_gpu(work: Callable[[], Any], repeats: int = 10) -> float:
    """Return the GPU time of `work` in seconds, measured with CUDA events, without host time.

    The GPU is kept busy until the host has queued all work, so that it never waits for the host.
    """
    work()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(50_000_000)  # cycles
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def measure_on_gpu(sizes: list[int], names: list[str], dtype: torch.dtype) -> list[dict]:
    """Time the contestants on a GPU: GPU time at every size, and host time."""

    def work(name: str, leaf: Tensor, grad: Tensor) -> None:
        torch.autograd.grad(CONTESTANTS[name](leaf), leaf, grad)

    def host(name: str, leaf: Tensor, grad: Tensor) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            work(name, leaf, grad)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / 100

    rows = []
    names = [name for name in names if name != "relu_inplace"]  # not possible on a leaf
    for size in [0, *sizes]:  # 0: the host
        leaf = torch.randn(size or 1024, device="cuda").to(dtype).requires_grad_()
        grad = torch.randn(size or 1024, device="cuda").to(dtype)
        how = (lambda f: f()) if size == 0 else time_on_gpu
        tasks = {name: partial(how, partial(host if size == 0 else work, name, leaf, grad)) for name in names}
        seconds = time_shuffled(tasks, rounds=20 if size == 0 else 5)
        for name in names:
            row = {"what": "GPU" if size else "host", "size": size or 1024, "activation": name}
            rows.append({**row, "us": 1e6 * seconds[name], "vs_relu": seconds[name] / seconds["relu"]})
    return rows


def measure(sizes: list[int], names: list[str], elements: int, dtype: torch.dtype) -> list[dict]:
    """Time the contestants at every size, with about `elements` elements over all rounds of a contestant."""
    rows = []
    for size in sizes:
        torch.manual_seed(0)
        leaf, grad = torch.randn(size).to(dtype).requires_grad_(), torch.randn(size).to(dtype)
        contestants = {name: partial(step, CONTESTANTS[name], leaf, grad) for name in names}
        seconds = time_shuffled(contestants, rounds=max(5, min(500, elements // size)))
        rows += [{"size": size, "activation": name, "us": 1e6 * seconds[name]} for name in names]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e4, 1e5, 1e6, 1e7, 1.6e7, 1e8], help="elements")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="contestants")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32", "float64"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--elements", type=float, default=4e8, help="elements per contestant and size, over all rounds")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--allocator", choices=ALLOCATORS, help="time in this process, with its current allocator")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = [int(size) for size in options.sizes]
    names = list(dict.fromkeys(["relu", "relu_inplace", *options.only]))

    dtype = getattr(torch, options.dtype)
    if options.device == "cuda":
        rows = measure_on_gpu(sizes, names, dtype)
        print(json.dumps(environment()))
        print_table(rows)
        if options.output:
            write_json(options.output, {"environment": environment(), "dtype": options.dtype, "rows": rows})
        return
    if options.allocator:
        rows = [{"allocator": options.allocator, **row} for row in measure(sizes, names, int(options.elements), dtype)]
    else:
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            for allocator in ALLOCATORS:
                part = Path(folder, f"{allocator}.json")
                arguments = [__file__, "--allocator", allocator, "--output", str(part), "--only", *names]
                arguments += [
                    "--dtype",
                    options.dtype,
                    "--threads",
                    str(options.threads),
                    "--elements",
                    str(options.elements),
                ]
                run_self([*arguments, "--sizes", *map(str, sizes)], allocator)
                rows += json.loads(part.read_text())["rows"]
    baseline = {(row["allocator"], row["size"], row["activation"]): row["us"] for row in rows}
    for row in rows:
        for name in ("relu", "relu_inplace"):
            row[f"vs_{name}"] = row["us"] / baseline[row["allocator"], row["size"], name]
    if not (options.allocator and options.output):
        print(json.dumps(environment()))
        print_table(rows)
    if options.output:
        write_json(options.output, {"environment": environment(), "dtype": options.dtype, "rows": rows})


if __name__ == "__main__":
    main()
