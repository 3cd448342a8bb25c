"""A complete example in two minutes, offline: train with SUGAR and with plain ReLU, package, load back, compare.

    python train/demo.py [--output DIR]

Trains two networks on scikit-learn's digits, each with both activations from the same seed. ResNet-18 has BatchNorm and
residual paths, so its units do not die; in 16 convolutions of 8 channels without BatchNorm, at a high learning rate,
they do.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table

from timm_sugar.data import load_source
from timm_sugar.terminal import Parser
from timm_sugar.training import TrainConfig, load_config, one_line_errors, train

NETWORKS = {"ResNet-18": "digits", "16 narrow convolutions": "digits_dying"}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder of the four runs")
    output = parser.parse_args().output
    with one_line_errors(parser.prog):
        compare(output)


def compare(output: Path) -> None:
    """Train, load back and print the table."""
    console = Console(width=100 if not sys.stdout.isatty() else None)
    table = Table(title="scikit-learn digits, the same seed for both activations")
    table.add_column("network")
    table.add_column("activation")
    for name in ("test accuracy", "dead units", "activation sparsity", "images/s"):
        table.add_column(name, justify="right")
    for network, recipe in NETWORKS.items():
        for activation, arguments in (("SUGAR B-SiLU", []), ("ReLU", ["--act-layer", "relu"])):
            folder = output / f"{recipe}-{'relu' if arguments else 'sugar'}"
            config = load_config([*arguments, "--output", str(folder)], "demo", "", recipe)
            console.print(f"training {network} with {activation} ...")
            summary = train(config)
            check_loaded_back(config, summary)
            table.add_row(
                network,
                activation,
                f"{100 * summary['test_top1']:.2f}%",
                f"{100 * summary['dead_units']:.2f}%",
                f"{100 * summary['activation_sparsity']:.1f}%",
                f"{summary['images_per_second']:,.0f}",
            )
    console.print(table)
    console.print(f"Each packaged model was loaded back from {output}/*/model with timm and gave the same accuracy.")


def check_loaded_back(config: TrainConfig, summary: dict[str, Any]) -> None:
    """Load the packaged folder with timm and check that its test accuracy is the recorded one."""
    model = timm.create_model(f"local-dir:{config.output}/model", pretrained=True)
    data_config = timm.data.resolve_model_data_config(model)
    test = load_source(config.data, split_seed=config.split_seed).test
    transform = timm.data.create_transform(**data_config, is_training=False)
    correct = 0
    with torch.inference_mode():
        for start in range(0, len(test), 128):
            stop = min(start + 128, len(test))
            images = torch.stack([transform(test[i]) for i in range(start, stop)])
            predicted = model.eval()(images).argmax(1)
            correct += (predicted == torch.from_numpy(test.labels[start:stop])).sum().item()
    if correct != round(summary["test_top1"] * len(test)):
        raise SystemExit(
            f"{config.output}/model loaded back has {correct / len(test):.4f} test accuracy, "
            f"not the recorded {summary['test_top1']:.4f}"
        )


if __name__ == "__main__":
    main()
