"""One training step of whole networks under each activation: time, images a second and saved activations.

    python benchmarks/step.py --output step.json
    python benchmarks/step.py --networks resnet18_sugar_bsilu --modes eager --rounds 5
    python benchmarks/step.py --device cuda --precision bfloat16 --modes eager reduce-overhead

ResNet-18 at 32 px with B-SiLU and Swin-T at 64 px with NeLU; on a GPU ResNet-18 at 32 px, ResNet-50 and Swin-T at 224
px. Each activation replaces that of the network. In bfloat16 the network is in channels_last.
`timm-sugar bench` does the same for any network.
"""

import argparse
import json
from pathlib import Path

import torch
from common import environment, print_table, write_json

from timm_sugar.analysis.speed import activations, bench

NETWORKS = {
    "resnet18_sugar_bsilu": dict(surrogate="bsilu", img_size=32, batch_size=128),
    "swin_tiny_sugar_nelu": dict(surrogate="nelu", img_size=64, batch_size=32),
}
NETWORKS_ON_GPU = {
    "resnet18_cifar_sugar_bsilu": dict(surrogate="bsilu", img_size=32, batch_size=128),
    "resnet50_sugar_bsilu": dict(surrogate="bsilu", img_size=224, batch_size=128),
    "swin_tiny_sugar_nelu": dict(surrogate="nelu", img_size=224, batch_size=128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices={**NETWORKS, **NETWORKS_ON_GPU})
    parser.add_argument(
        "--modes", nargs="+", choices=["eager", "compile", "reduce-overhead"], default=["eager", "compile"]
    )
    parser.add_argument("--only", nargs="+", choices=activations("bsilu"), help="activations")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    known = NETWORKS_ON_GPU if options.device == "cuda" else NETWORKS
    rows = []
    print(json.dumps(environment()))
    for network in options.networks or known:
        for mode in options.modes:
            how = dict(only=options.only, rounds=options.rounds, device=options.device, precision=options.precision)
            how["compiled"] = {"eager": False, "compile": True}.get(mode, mode)
            measured = bench(network, **(known[network] if network in known else NETWORKS[network]), **how)
            rows += [{"network": network, "mode": mode, **row} for row in measured]
            torch._dynamo.reset()
            print_table(rows[-len(measured) :])
    if options.output:
        write_json(options.output, {"environment": environment(), "precision": options.precision, "rows": rows})


if __name__ == "__main__":
    main()
