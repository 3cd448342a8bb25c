"""Compare a network's own activation with SUGAR on one data set, over learning rates and seeds."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from ..activations import activation_kinds
from ..analysis.comparison import FILE, paired, verdict
from ..analysis.seeds import interval
from ..data import fingerprint
from ..files import read_mapping, write_file
from ..layers import Activation
from ..settings import TrainConfig, names_of, to_flags
from ..surrogates import get_surrogate
from .cells import Cell, last_line, run, summary_of
from .config import load_config
from .folder import read_record
from .images import open_source
from .network import build_network, check_names
from .pretrained import find_initial

RECIPE = "compare"
RATES = (0.0003, 0.001, 0.003)
SURROGATES = ("bsilu", "nelu")
_VARIED = ("seed", "lr", "surrogate", "alpha", "act_layer", "convert")


@dataclass(frozen=True)
class Comparison:
    """A grid of runs in a folder: each activation with each learning rate and seed."""

    folder: Path  # contains compare.json and the runs as seedN/ACTIVATION-lrRATE
    baseline: str  # name of the network's own activation; "relu" for networks that are built with SUGAR
    surrogates: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    cells: dict[tuple[str, float, int], Cell]  # by activation, rate and seed; ordered by seed
    class_names: tuple[str, ...]

    @property
    def activations(self) -> list[str]:
        """The names of the compared activations, the baseline first."""
        return [self.baseline, *(f"sugar_{name}" for name in self.surrogates)]

    @property
    def grid(self) -> dict[str, Any]:
        """The grid as stored in compare.json, from which a later call extends it."""
        axes = {name: list(getattr(self, name)) for name in ("surrogates", "rates", "seeds")}
        return {"baseline": self.baseline} | axes

    def train(self, jobs: int | None = None, minutes: float = math.inf) -> dict[Cell, str]:
        """Train the unfinished runs as `timm_sugar.training.cells.run`; divergence does not count as a failure."""
        waiting = [cell for cell in self.cells.values() if not _diverged(cell)]
        failures = run(waiting, jobs, minutes)
        return {cell: reason for cell, reason in failures.items() if not _diverged(cell)}


def plan(
    folder: Path,
    flags: Sequence[str],
    surrogates: Sequence[str] | None = None,
    rates: Sequence[float] | None = None,
    seeds: int | None = None,
) -> Comparison:
    """Build a comparison, or extend the one in a folder, and validate everything possible before training.

    Args:
        folder: Folder of the comparison. Its grid only grows, so that all activations have the same rates and seeds.
        flags: Flags of the trainer for all runs, including the data.
        surrogates, rates, seeds: Values to add to the grid; None keeps the existing ones, or takes the defaults for a
            new comparison.

    Raises:
        ValueError, OSError, ModuleNotFoundError: a setting, the data or the network is invalid, or the folder contains
            runs with other settings or other data.
    """
    for flag in (flag.split("=")[0] for flag in flags if flag.startswith("--")):
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        if name in _VARIED:
            raise ValueError(f"{flag} is what a comparison varies: it takes --seeds, --lrs and --surrogates")
        if name in names_of("start"):
            raise ValueError(f"{flag} is not for a comparison")
    before = read_mapping(folder / FILE) if (folder / FILE).is_file() else {}
    grid = before.get("grid", {})
    names = [get_surrogate(name).name for name in surrogates or ()]
    names = [*dict.fromkeys([*grid.get("surrogates", ()), *(names or ([] if grid else SURROGATES))])]
    lrs = sorted({*grid.get("rates", ()), *(rates or (() if grid else RATES))})
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    count = max(len(grid.get("seeds", ())), seeds or (0 if grid else 3))

    def config_of(settings: dict[str, Any]) -> tuple[TrainConfig, list[str]]:
        argv = ["--recipe", RECIPE, *flags, *to_flags({"output": folder} | settings)]
        return load_config(argv, "compare", "", RECIPE), argv

    def network_of(settings: dict[str, Any]) -> nn.Module:
        config, initial = find_initial(config_of(settings)[0])
        return build_network(config, source, initial)

    config, _ = config_of({})
    if not config.val_fraction:
        raise ValueError("a comparison chooses learning rates on validation images, so val_fraction must be above 0")
    check_names(config)
    source = open_source(config)
    own: dict[str, Any] = {}
    network = network_of(own)
    if Activation.of(network).surrogate:
        own = {"act_layer": "relu"}
        network = network_of(own)
    baseline = "+".join(activation_kinds(network)) or "own"
    settings = {baseline: own} | {f"sugar_{name}": {"surrogate": name} for name in names}
    for extra in list(settings.values())[1:]:
        network_of(extra)
    cells = {}
    for seed in range(count):
        for rate in lrs:
            for activation, extra in settings.items():
                name = f"{activation}-lr{rate:g}"
                place = {"seed": seed, "lr": rate, "output": folder / f"seed{seed}" / name}
                settled, argv = config_of(extra | place)
                cells[activation, rate, seed] = Cell(name, settled, ("-m", "timm_sugar.training", *argv))
    found = Comparison(folder, baseline, tuple(names), tuple(lrs), tuple(range(count)), cells, source.class_names)
    data = fingerprint(source)
    for cell in cells.values():
        run_folder = cell.config.folder
        if (read_record(run_folder) or {}).get("data_fingerprint") not in (None, data):
            raise ValueError(f"{run_folder} was trained on other data than {config.data} is now; give another --output")
        summary_of(cell)  # raises if its settings differ
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / FILE, json.dumps(before | {"grid": found.grid}) + "\n")
    return found


def _diverged(cell: Cell) -> bool:
    """Whether training of a cell ended because its loss was not finite; training it again would fail again."""
    return summary_of(cell) is None and "the loss is not finite at step" in last_line(cell)


def table(comparison: Comparison) -> dict[str, Any]:
    """Return the results of the finished runs, and write them to compare.json.

    Only seeds with all of their runs done count. The learning rate of each activation is the one with the highest mean
    validation accuracy over these seeds; rates at which a run diverged are excluded. Test accuracies at these rates
    are compared by seed.

    Returns:
        grid; done and runs, the numbers of finished and of all runs; seeds, those that count; test_images; classes;
        rows, one per activation: activation, rate, edge ("lowest" or "highest" of several rates, else None),
        val_top1 and test_top1 (mean), test_interval (half of the 95% t-interval, None for one seed), dead_units,
        class_top1 (mean by class), difference (to the baseline, mean), low and high (its 95% paired t-interval), p (of
        the paired t-test; None if undefined), differences (by seed) and runs (their folders); and the verdict.
        Accuracies are fractions of 1.
    """
    settled = {key: summary_of(cell) for key, cell in comparison.cells.items()}
    done = {key for key, cell in comparison.cells.items() if settled[key] is not None or _diverged(cell)}
    seeds = [
        seed
        for seed in comparison.seeds
        if all((name, rate, seed) in done for name in comparison.activations for rate in comparison.rates)
    ]
    rows: list[dict[str, Any]] = []
    base: list[float] = []
    for name in comparison.activations if seeds else ():
        runs = {rate: [settled[name, rate, seed] for seed in seeds] for rate in comparison.rates}
        finite = {rate: [run for run in found if run] for rate, found in runs.items() if all(found)}
        if not finite:
            rows.append(dict(activation=name, rate=None))
            continue
        rate = max(finite, key=lambda rate: fmean(run["val_top1"] for run in finite[rate]))
        best, chosen = finite[rate], [comparison.cells[name, rate, seed] for seed in seeds]
        tests = [run["test_top1"] for run in best]
        dead = [run["dead_units"] for run in best if run.get("dead_units") is not None]
        edge = {comparison.rates[0]: "lowest", comparison.rates[-1]: "highest"} if len(comparison.rates) > 1 else {}
        columns = zip(*(run["test_class_top1"].values() for run in best), strict=True)
        row = dict(
            activation=name, rate=rate, edge=edge.get(rate), val_top1=fmean(run["val_top1"] for run in best),
            test_top1=fmean(tests), test_interval=interval(tests), dead_units=fmean(dead) if dead else None,
            class_top1=[None if None in column else fmean(column) for column in columns],
            runs=[str(cell) for cell in chosen],
        )  # fmt: skip
        if name == comparison.baseline:
            base = tests
        elif base:
            row |= paired([test - other for test, other in zip(tests, base, strict=True)])
        rows.append(row)
    found: dict[str, Any] = dict(
        grid=comparison.grid, done=len(done), runs=len(settled), seeds=seeds,
        test_images=next((run["test_images"] for run in settled.values() if run), 0),
        classes=list(comparison.class_names), rows=rows,
    )  # fmt: skip
    found["verdict"] = verdict(found)
    write_file(comparison.folder / FILE, json.dumps(found) + "\n")
    return found
