"""Overhead of `DeadUnitMonitor` in a training step: the same network with and without it, interleaved.

    python benchmarks/monitor.py --output monitor.json
    python benchmarks/monitor.py --networks resnet18 --modes eager --rounds 20 --clock cpu

A round is five steps each without a monitor, with one that counts every fifth step (the default), and with one that
counts every step, in rotating order. The figure is the median over rounds of the time relative to the time without a
monitor in the same round, with quartiles. `--clock cpu` uses CPU time instead of wall time, for a busy machine.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from common import environment, print_table, write_json

import timm_sugar

NETWORKS = {
    "resnet18": ("resnet18_sugar_bsilu", {}, 32, 128),
    "resnet18_3x3_stem": ("resnet18_cifar_sugar_bsilu", {}, 32, 32),
    "resnet18_224": ("resnet18_sugar_bsilu", {}, 224, 4),
    "vit_tiny": ("vit_tiny_patch16_224", {"img_size": 64, "patch_size": 8}, 64, 32),
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
STEPS = 5


def measure(network: str, mode: str, rounds: int, device: str, precision: str, clock: str) -> list[dict[str, object]]:
    name, arguments, size, batch = NETWORKS[network]
    x, y = torch.randn(batch, 3, size, size, device=device), torch.randint(10, (batch,), device=device)
    if precision != "float32":
        x = x.contiguous(memory_format=torch.channels_last)

    def steps(every: int | None):
        model = timm.create_model(name, num_classes=10, **arguments).to(device).train()
        if precision != "float32":
            model = model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        if every is not None:
            timm_sugar.DeadUnitMonitor(model, every=every, warn_above=None)
        run = torch.compile(model) if mode == "compile" else model
        dtype = getattr(torch, precision)

        def block() -> float:
            began = CLOCKS[clock]()
            for _ in range(STEPS):
                with torch.autocast(device, dtype, enabled=precision != "float32"):
                    loss = F.cross_entropy(run(x).float(), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
            return CLOCKS[clock]() - began

        return block

    blocks = {"none": steps(None), "every 5th step": steps(5), "every step": steps(1)}
    for block in blocks.values():
        block()
    times: dict[str, list[float]] = {key: [] for key in blocks}
    for number in range(rounds):
        order = [*blocks][number % 3 :] + [*blocks][: number % 3]
        for key in order:
            times[key].append(blocks[key]())
    rows = []
    for key, found in times.items():
        ratios = [time / none for time, none in zip(found, times["none"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        step = 1e3 * statistics.median(found) / STEPS
        rows.append(dict(network=network, mode=mode, counted=key, ms=step, ratio=middle, low=low, high=high))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--modes", nargs="+", choices=["eager", "compile"], default=["eager"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(environment()))
    rows = []
    for network in options.networks:
        for mode in options.modes:
            found = measure(network, mode, options.rounds, options.device, options.precision, options.clock)
            rows += found
            print_table(found)
    if options.output:
        write_json(options.output, {"environment": environment(), "clock": options.clock, "rows": rows})


if __name__ == "__main__":
    main()
