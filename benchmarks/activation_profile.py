"""Overhead of a profile over a plain evaluation pass. Run ``python benchmarks/activation_profile.py``.

All passes use the same images in memory and run once per round in random order; the ratio is that of their median
times. `counting` is `timm_sugar.analysis.count_units` around the evaluation, as in the training scripts after each
epoch; `profile` is `timm_sugar.analysis.profile`, including its summary. On a busy machine use `--clock cpu`, which
measures the CPU time of this process, with one thread.
"""

import argparse
import time
from collections.abc import Callable

import timm
import torch
from common import environment, print_table

import timm_sugar  # noqa: F401  # registers the models
from timm_sugar.analysis import count_units, profile
from timm_sugar.analysis.speed import time_shuffled
from timm_sugar.data import evaluate_batches, normalize

MEAN, STD = (0.5,) * 3, (0.25,) * 3
NETWORKS = {  # name: image size, images a pass, arguments
    "resnet18_sugar_bsilu": (32, 512, {}),
    "resnet18_cifar_sugar_bsilu": (32, 128, {}),
    "swin_tiny_sugar_nelu": (64, 128, {"img_size": 64}),
}


def contestants(name: str, batch_size: int, device: str, clock: Callable[[], float]) -> dict[str, Callable[[], float]]:
    """Return the passes over one network; each returns its time in seconds."""
    size, count, arguments = NETWORKS[name]
    model = timm.create_model(name, num_classes=10, **arguments).to(device).eval()
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    labels = torch.randint(0, 10, (count,))
    batches = [*zip(pixels.split(batch_size), labels.split(batch_size), strict=True)]

    def evaluate() -> None:
        evaluate_batches(model, batches, MEAN, STD)

    def counting() -> None:
        with count_units(model) as counts:
            evaluate()
        assert counts.dead_units < 1

    def profiled() -> None:
        profile(model, (normalize(images.to(device), MEAN, STD) for images, _ in batches))

    def timed(work: Callable[[], None]) -> Callable[[], float]:
        def run() -> float:
            began = clock()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            return clock() - began

        return run

    return {"evaluation": timed(evaluate), "counting": timed(counting), "profile": timed(profiled)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=[*NETWORKS], choices=NETWORKS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    args = parser.parse_args()
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    machine = ", ".join(f"{key} {value}" for key, value in environment().items())
    print(f"{machine}, batch {args.batch_size}, {args.clock} clock")
    rows = []
    for name in args.networks:
        size, count, _ = NETWORKS[name]
        seconds = time_shuffled(contestants(name, args.batch_size, args.device, clock), args.rounds)
        plain = seconds["evaluation"]
        rows.append(
            {
                "network": f"{name}, {size} px",
                "evaluation, images/s": round(count / plain),
                "counting / evaluation": seconds["counting"] / plain,
                "profile / evaluation": seconds["profile"] / plain,
            }
        )
    print_table(rows)


if __name__ == "__main__":
    main()
