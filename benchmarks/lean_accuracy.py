"""Test accuracy of one network trained with each save mode, from the same seeds, on the same images in the same order.

    python benchmarks/lean_accuracy.py --data cifar10 --train-images 10000 --epochs 3 --output lean_accuracy.json

The network is resnet18_sugar_bsilu at 32 px, trained by SGD with a cosine schedule.
"""

import argparse
import tempfile
from pathlib import Path

from common import environment, print_table, write_json

from timm_sugar.functional import SAVE_MODES
from timm_sugar.training import Stopped, TrainConfig, one_line_errors, train


def accuracy(save: str, seed: int, options: argparse.Namespace, folder: str) -> dict:
    """Train with one save mode and seed, and return a row of the table."""
    summary = train(
        TrainConfig(
            data=options.data,
            limit_train=options.train_images,
            val_fraction=0.0,
            model="resnet18_sugar_bsilu",
            model_args={"save": save},
            epochs=options.epochs,
            lr=0.05,
            weight_decay=5e-4,
            sched="cosine",
            mixed_precision=options.mixed_precision,
            seed=seed,
            output=str(Path(folder, f"{save}-{seed}")),
        )
    )
    row = {"save": save, "seed": seed, "test_accuracy_percent": 100 * summary["test_top1"]}
    return {**row, "test_loss": summary["test_loss"], "seconds": summary["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="cifar10, or a local folder of parquet files")
    parser.add_argument("--train-images", type=int, help="size of a stratified training sample; default: all")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, one_line_errors(parser.prog):
        try:
            rows = [accuracy(save, seed, options, folder) for seed in options.seed for save in SAVE_MODES]
        except Stopped:  # the temporary folder is deleted: the run cannot be resumed
            raise KeyboardInterrupt from None
    exact = {row["seed"]: row["test_accuracy_percent"] for row in rows if row["save"] == "exact"}
    for row in rows:
        row["vs_exact_points"] = row["test_accuracy_percent"] - exact[row["seed"]]
    print_table(rows)
    if options.output:
        write_json(options.output, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
