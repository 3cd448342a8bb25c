"""Dead units of a ReLU network, and how many are revived with ReLU and with SUGAR, from the same weights.

    python train/reviving_units.py --data cifar10 --output output/reviving_units

Trains a narrow VGG-16 without BatchNorm with plain ReLU at a learning rate that kills units. Training then continues
from its last weights, with a new optimizer at that rate and at a lower one, once with ReLU and once with the network
converted to SUGAR. Writes revival.json and pictures. The same command resumes an interrupted run.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

try:
    from timm_sugar.analysis.palette import PALETTE
    from timm_sugar.analysis.plots import activation_ridges, dead_units_by_layer, metric_curves, save
    from timm_sugar.training import TrainConfig, one_line_errors, train
except ModuleNotFoundError as error:
    sys.exit(f"reviving_units.py: {error.name} is missing: pip install 'timm-sugar[train,report]'")

from timm_sugar import convert
from timm_sugar.analysis import Profile, profile, revived_units
from timm_sugar.data import normalize
from timm_sugar.files import write_file
from timm_sugar.layers import Activation
from timm_sugar.metrics import find_metric
from timm_sugar.terminal import Parser
from timm_sugar.training.checkpoint import latest_checkpoint, read_checkpoint
from timm_sugar.training.folder import check_writable, finished_summary
from timm_sugar.training.processes import folder_lock
from timm_sugar.training.train import Run, build, fit

WIDTHS = [1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M"]  # VGG-16, in units of its first layer
ARMS = {"relu": None, "sugar": "bsilu"}
PROFILES = "profiles.json"
COUNTS = ("dead_before", "revived", "died", "dead_after")  # columns of `revived_units`
LABELS = {"relu": "ReLU", "sugar": "SUGAR B-SiLU"}
EXAMPLE = """examples:
  python train/reviving_units.py --data cifar10                       three seeds, into output/reviving_units
  python train/reviving_units.py --data path/to/folder --seeds 0 --limit-train 2000 --epochs 2 --more-epochs 2"""


def main() -> None:
    parser = Parser(
        description=__doc__.split("\n\n")[0], epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="cifar10", help="data set, as in the training scripts (default cifar10)")
    parser.add_argument("--output", type=Path, default=Path("output/reviving_units"), metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default 0 1 2")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of the first training, with ReLU (default 8)")
    parser.add_argument("--more-epochs", type=int, default=5, help="epochs of each continued training (default 5)")
    parser.add_argument("--width", type=int, default=16, help="channels of the first layer; VGG-16 has 64 (default 16)")
    parser.add_argument("--opt", default="adamw", help="optimizer (default adamw)")
    parser.add_argument("--lr", type=float, default=0.0014, help="first learning rate (default 0.0014)")
    parser.add_argument(
        "--more-lr", type=float, nargs="+", default=[0.0014, 0.0003], metavar="LR", help="learning rates after that"
    )
    parser.add_argument("--limit-train", type=int, default=5000, help="training images (default 5000)")
    parser.add_argument("--limit-val", type=int, default=2000, help="images to count dead units on (default 2000)")
    parser.add_argument("--mixed-precision", default="bf16", help="precision of training: bf16 or no (default bf16)")
    arguments = parser.parse_args()
    with one_line_errors(parser.prog):
        plans = [plan(arguments, seed) for seed in dict.fromkeys(arguments.seeds)]
        records = [revive(*each) for each in plans]
    given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    write_file(arguments.output / "revival.json", json.dumps({"settings": given, "seeds": records}, indent=1) + "\n")
    draw(records, arguments.output)
    show(records)


def plan(arguments: argparse.Namespace, seed: int) -> tuple[TrainConfig, dict[tuple[str, float], TrainConfig]]:
    """Return the settings of a seed's first training, and of its continued trainings by arm and learning rate."""
    folder = arguments.output / f"seed{seed}"
    after = {
        (arm, lr): settings(arguments, seed, arguments.more_epochs, lr, folder / f"{arm}-{lr:g}")
        for lr in arguments.more_lr
        for arm in ARMS
    }
    return settings(arguments, seed, arguments.epochs, arguments.lr, folder / "first"), after


def settings(arguments: argparse.Namespace, seed: int, epochs: int, lr: float, output: Path) -> TrainConfig:
    return TrainConfig(
        data=arguments.data,
        model="vgg16_cifar_sugar_bsilu",
        act_layer="relu",
        model_args={"norm_layer": "", "cfg": [w if w == "M" else w * arguments.width for w in WIDTHS]},
        opt=arguments.opt,
        lr=lr,
        epochs=epochs,
        limit_train=arguments.limit_train,
        limit_val=arguments.limit_val,
        mixed_precision=arguments.mixed_precision,
        channels_last=True,
        workers=0,
        seed=seed,
        output=str(output),
    )


def revive(first: TrainConfig, after: dict[tuple[str, float], TrainConfig]) -> dict[str, Any]:
    """Train a network with ReLU, continue with ReLU and with SUGAR, and compare the dead units before and after."""
    summary = train(first)
    start = last_weights(first.folder)
    record = {"seed": first.seed, "first": {"metrics": metrics(first.folder), "summary": summary}, "after": []}
    for (arm, lr), config in after.items():
        summary = finished_summary(config)
        if summary is None or not (config.folder / PROFILES).is_file():
            summary = go_on(config, start, ARMS[arm])
        found = {"arm": arm, "lr": lr, "metrics": metrics(config.folder), "summary": summary}
        record["after"].append(found | {"layers": revived_units(*profiles(config.folder).values())})
    return record


def go_on(config: TrainConfig, start: dict[str, Any], surrogate: str | None) -> dict[str, Any]:
    """Train from the weights `start`, converted if a surrogate is given, and profile the network on val."""
    check_writable(config.folder)
    with folder_lock(config.folder):
        run = build(config)
        for network in (run.network, run.evaluated):
            network.load_state_dict(start)
            if surrogate:
                convert(network, surrogate)
        summary = fit(replace(run, activation=Activation.of(run.network)))
        weights = {"before": start, "after": last_weights(run.config.folder)}
        found = {when: profile_on_val(run, tensors).to_dict() for when, tensors in weights.items()}
        write_file(run.config.folder / PROFILES, json.dumps(found) + "\n")
    return summary


def profiles(output: Path) -> dict[str, dict[str, Any]]:
    """The profiles of a network before and after its continued training, in that order."""
    return json.loads((output / PROFILES).read_text(encoding="utf-8"))


def last_weights(folder: Path) -> dict[str, Any]:
    return read_checkpoint(latest_checkpoint(folder / "checkpoints")).weights


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def profile_on_val(run: Run, weights: dict[str, Any]) -> Profile:
    run.evaluated.load_state_dict(weights)
    order = [range(len(run.images.val))[i : i + 256] for i in range(0, len(run.images.val), 256)]
    batches = run.images.val.batches([list(indices) for indices in order])
    return profile(run.evaluated, (normalize(pixels, run.config.mean, run.config.std) for pixels, _ in batches))


def draw(records: list[dict[str, Any]], output: Path) -> None:
    """Dead units and accuracy by epoch, dead units by layer, and activation profiles, for each learning rate."""
    first = [record["first"]["metrics"] for record in records]
    begun = len(first[0])
    for lr in dict.fromkeys(found["lr"] for found in records[0]["after"]):
        curves, found = {}, {}
        for arm, label in LABELS.items():
            after = [run for r in records for run in r["after"] if (run["arm"], run["lr"]) == (arm, lr)]
            curves[f"ReLU, then {label}"] = [
                [*lines, *({**line, "epoch": begun + line["epoch"]} for line in run["metrics"])]
                for lines, run in zip(first, after, strict=True)
            ]
            of_seeds = [profiles(output / f"seed{record['seed']}" / f"{arm}-{lr:g}") for record in records]
            found |= {"before": [each["before"] for each in of_seeds]}
            found |= {f"after {label}": [each["after"] for each in of_seeds]}
        shown = [find_metric(name) for name in ("dead_units", "val_top1")]
        arms = [PALETTE[surrogate or "relu"] for surrogate in ARMS.values()]
        figure = metric_curves(curves, shown, arms, spread=stdev)
        for ax in figure.axes:
            ax.axvline(begun, color="0.5", linestyle=":", linewidth=1)
        save(figure, output / f"epochs_{lr:g}")
        styles = [PALETTE["relu"]._replace(colour="#9aa3ad"), *arms]  # before: also ReLU, in a paler colour
        save(dead_units_by_layer(found, styles), output / f"layers_{lr:g}")
        save(activation_ridges({label: each[0] for label, each in found.items()}, styles), output / f"profile_{lr:g}")


def show(records: list[dict[str, Any]]) -> None:
    """Print Markdown tables: mean and standard deviation over the seeds, and revived and dead units of each layer."""
    units = sum(layer["units"] for layer in records[0]["after"][0]["layers"])
    print(f"{units} units; seeds {', '.join(str(record['seed']) for record in records)}")
    print("\n| goes on with | lr | dead before | revived | died | dead after | val top-1 (%) | test top-1 (%) |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for place, found in enumerate(records[0]["after"]):
        runs = [record["after"][place] for record in records]
        sums = [
            {key: sum(row[key] for row in run["layers"]) for key in run["layers"][0] if key != "name"} for run in runs
        ]
        cells = [spread([row[key] for row in sums]) for key in COUNTS]
        cells.append(spread([100 * run["metrics"][-1]["val_top1"] for run in runs]))
        cells.append(spread([100 * run["summary"]["test_top1"] for run in runs]))
        print(f"| {LABELS[found['arm']]} | {found['lr']:g} | {' | '.join(cells)} |")
    print("\nbefore: val top-1", spread([100 * record["first"]["metrics"][-1]["val_top1"] for record in records]))
    print(f"\nRevived / died by layer, {len(records)} seeds together:\n")
    columns = [f"{LABELS[found['arm']]}, {found['lr']:g}" for found in records[0]["after"]]
    print(f"| layer | units | dead before | {' | '.join(columns)} |\n| --- | --- | --- |{' --- |' * len(columns)}")
    for number in range(len(records[0]["after"][0]["layers"])):
        rows = [[record["after"][place]["layers"][number] for record in records] for place in range(len(columns))]
        total = [{key: sum(row[key] for row in seeds) for key in COUNTS} for seeds in rows]
        pairs = [f"{counts['revived']} / {counts['died']}" for counts in total]
        units = len(records) * rows[0][0]["units"]
        print(f"| {number + 1} | {units} | {total[0]['dead_before']} | {' | '.join(pairs)} |")


def spread(values: list[float]) -> str:
    text = f"{mean(values):.1f}"
    return f"{text} ± {stdev(values):.1f}" if len(values) > 1 else text


if __name__ == "__main__":
    main()
