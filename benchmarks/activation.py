"""Forward and backward of single activations against nn.ReLU, by tensor size, with two memory allocators.

    python benchmarks/activation.py --output activation.json
    python benchmarks/activation.py --sizes 1e6 1.6e7 --only relu gelu sugar_bsilu

Each figure is the median over shuffled rounds, in microseconds for one forward and backward of a float32 tensor. The
input of the activation is the result of another operation, as in a network, so that nn.ReLU(inplace=True) takes part.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

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
    """Seconds for the forward and the backward of one activation on the clone of a leaf."""
    x = leaf.clone()
    start = time.perf_counter()
    y = activation(x)
    del x
    (result,) = torch.autograd.grad(y, leaf, grad)
    del y, result
    return time.perf_counter() - start


def measure(sizes: list[int], names: list[str], elements: int) -> list[dict]:
    """Time the contestants at every size, about `elements` elements in each contestant's rounds."""
    rows = []
    for size in sizes:
        torch.manual_seed(0)
        leaf, grad = torch.randn(size, requires_grad=True), torch.randn(size)
        contestants = {name: partial(step, CONTESTANTS[name], leaf, grad) for name in names}
        seconds = time_shuffled(contestants, rounds=max(5, min(500, elements // size)))
        rows += [{"size": size, "activation": name, "us": 1e6 * seconds[name]} for name in names]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e4, 1e5, 1e6, 1e7, 1.6e7, 1e8], help="elements")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="contestants")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--elements", type=float, default=4e8, help="elements that a contestant sees at each size")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--allocator", choices=ALLOCATORS, help="time in this process, with its allocator as it is")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = [int(size) for size in options.sizes]
    names = list(dict.fromkeys(["relu", "relu_inplace", *options.only]))

    if options.allocator:
        rows = [{"allocator": options.allocator, **row} for row in measure(sizes, names, int(options.elements))]
    else:
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            for allocator in ALLOCATORS:
                part = Path(folder, f"{allocator}.json")
                arguments = [__file__, "--allocator", allocator, "--output", str(part), "--only", *names]
                arguments += ["--threads", str(options.threads), "--elements", str(options.elements)]
                run_self([*arguments, "--sizes", *map(str, sizes)], allocator)
                rows += json.loads(part.read_text())["rows"]
    baseline = {(row["allocator"], row["size"], row["activation"]): row["us"] for row in rows}
    for row in rows:
        for name in ("relu", "relu_inplace"):
            row[f"vs_{name}"] = row["us"] / baseline[row["allocator"], row["size"], name]
    if not (options.allocator and options.output):
        print_table(rows)
    if options.output:
        write_json(options.output, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
