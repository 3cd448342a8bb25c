"""One training step of whole networks under each activation: time, images a second and saved activations.

    python benchmarks/step.py --output step.json
    python benchmarks/step.py --networks resnet18_sugar_bsilu --modes eager --rounds 5

ResNet-18 at 32 px with B-SiLU and Swin-T at 64 px with NeLU, in float32, each activation taking the place of theirs.
`timm-sugar bench` does the same for any network.
"""

import argparse
from pathlib import Path

import torch
from common import environment, print_table, write_json

from timm_sugar.analysis.speed import activations, bench

NETWORKS = {
    "resnet18_sugar_bsilu": dict(surrogate="bsilu", img_size=32, batch_size=128),
    "swin_tiny_sugar_nelu": dict(surrogate="nelu", img_size=64, batch_size=32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--modes", nargs="+", choices=["eager", "compile"], default=["eager", "compile"])
    parser.add_argument("--only", nargs="+", choices=activations("bsilu"), help="activations")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for network in options.networks:
        for mode in options.modes:
            how = dict(only=options.only, rounds=options.rounds, compiled=mode == "compile")
            measured = bench(network, **NETWORKS[network], **how)
            rows += [{"network": network, "mode": mode, **row} for row in measured]
    print_table(rows)
    if options.output:
        write_json(options.output, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
