"""Inference of one network with SUGAR, with ReLU and with GELU. Run ``python benchmarks/inference.py [--device cuda]``.

Prints a Markdown table: the time of a forward without gradients, relative to ReLU's. The networks alternate in
every round, and the fastest round of each is reported, since other work on the machine disturbs it least.
"""

import argparse
import platform
import time

import timm
import torch

from timm_sugar import to_relu

NETWORKS = {  # name: image size
    "resnet18_cifar_sugar_bsilu": 32,
    "swin_tiny_sugar_nelu": 224,
    "conv2next_sugar": 32,
}
VARIANTS = ("ReLU", "SUGAR", "SUGAR after to_relu", "GELU")


def build(name: str, variant: str) -> torch.nn.Module:
    """Return the network in eval mode with the activation of a variant."""
    if variant.startswith("SUGAR"):
        model = timm.create_model(name)
        return (to_relu(model) if "to_relu" in variant else model).eval()
    return timm.create_model(name, act_layer=variant.lower()).eval()


@torch.inference_mode()
def measure(name: str, size: int, batch_size: int, rounds: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of each forward, by variant."""
    models = {variant: build(name, variant).to(device) for variant in VARIANTS}
    x = torch.randn(batch_size, 3, size, size, device=device)
    seconds = {variant: [] for variant in VARIANTS}
    for i in range(rounds + 2):
        for variant in VARIANTS[i % 4 :] + VARIANTS[: i % 4]:
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            models[variant](x)
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= 2:  # the first rounds warm up
                seconds[variant].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{device}, {platform.machine()}, torch {torch.__version__}, timm {timm.__version__}, ", end="")
    print(f"float32, batch {args.batch_size}, fastest of {args.rounds} rounds\n")
    print(f"| network | ReLU, ms | {' | '.join(VARIANTS[1:])} |\n| --- | --- | --- | --- | --- |")
    for name, size in NETWORKS.items():
        seconds = measure(name, size, args.batch_size, args.rounds, args.device)
        ratios = [min(seconds[v]) / min(seconds["ReLU"]) for v in VARIANTS[1:]]
        milliseconds = 1000 * min(seconds["ReLU"])
        print(f"| {name} | {milliseconds:.1f} | {' | '.join(f'{r:.2f}' for r in ratios)} |", flush=True)


if __name__ == "__main__":
    main()
