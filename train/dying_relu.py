"""The paper's appendix A: dying ReLUs with and without SUGAR, as a table with the paper's figures and as pictures.

    python train/dying_relu.py --output output/dying_relu

Networks of 10 hidden layers of width 2, four target functions, 100 runs per cell. Writes table2.json and the figures as
PNG and PDF. Finished cells are kept in OUTPUT/cells and skipped.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

try:
    from rich.console import Console
    from rich.table import Table

    from paper import figures as paper_figures
    from paper.collapse import COLLAPSED, paper_function, paper_shapes, table_row
    from timm_sugar.analysis.plots import save
except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    if package not in ("rich", "matplotlib", "scipy"):
        raise
    extra = {"rich": "train", "scipy": "train", "matplotlib": "report"}[package]
    sys.exit(f"dying_relu.py: {package} is missing: pip install 'timm-sugar[{extra}]'")

from paper.dying_relu import TARGETS, Cell, run_cells
from timm_sugar import list_surrogates
from timm_sugar.files import write_file
from timm_sugar.terminal import Parser, progress_bars

METHODS = ("he", "rai", "sugar", "rai_sugar")
SWEEP_DEPTHS = (2, 3, 5, 7, 10, 15, 25, 40)
EXAMPLE = """examples:
  python train/dying_relu.py                                    table 2 in full, into output/dying_relu
  python train/dying_relu.py --runs 1000 --depth 10 9           ten times the runs, with 9 hidden layers too
  python train/dying_relu.py --surrogate all --sweep            every surrogate, and collapse against depth
  python train/dying_relu.py --runs 10 --epochs 20 --output /tmp/try"""


def main() -> None:
    parser = Parser(
        description=__doc__.split("\n\n")[0], epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=100, help="independent runs per cell (default 100)")
    parser.add_argument("--output", type=Path, default=Path("output/dying_relu"), help="folder (output/dying_relu)")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, help="rows of the table (default: all four)"
    )
    parser.add_argument("--surrogate", default="bsilu", help="surrogate of SUGAR: a name, or all (default bsilu)")
    parser.add_argument(
        "--depth", type=int, nargs="+", default=[10], help="hidden layers (default 10); pictures use the first"
    )
    parser.add_argument("--width", type=int, default=2, help="units per layer (default 2)")
    parser.add_argument("--epochs", type=int, default=250, help="passes over the samples (default 250)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the runs (default 0)")
    parser.add_argument("--sweep", action="store_true", help="also measure collapse against depth, 2 to 40, on f1")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    if not {"he", "sugar"} <= {*arguments.methods}:
        parser.error(f"--methods must hold he and sugar, which the pictures compare, got {' '.join(arguments.methods)}")
    try:
        cells, sweep = plan(arguments)
        arguments.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    results = run(list(dict.fromkeys([*cells, *sweep])), arguments.output / "cells", arguments.jobs)
    rows = [table_row(cell, results[cell]) for cell in cells]
    write_json(arguments.output / "table2.json", rows)
    swept = [table_row(cell, results[cell]) for cell in sweep]
    if swept:
        write_json(arguments.output / "depth.json", swept)
    draw([results[cell] for cell in cells], swept, arguments)
    show(rows, [results[cell] for cell in cells])


def plan(arguments: argparse.Namespace) -> tuple[list[Cell], list[Cell]]:
    """The cells of the table and those of the sweep over depth."""
    surrogates = list_surrogates() if arguments.surrogate == "all" else [arguments.surrogate]
    combined = "bsilu" if arguments.surrogate == "all" else arguments.surrogate
    first = sorted(surrogates, key=lambda name: name != combined)
    sugar = [f"sugar_{first[0]}", f"rai_sugar_{combined}", *(f"sugar_{name}" for name in first[1:])]

    kinds = {method: re.sub("(?<=sugar)_.*", "", method) for method in ("he", "rai", *sugar)}
    methods = [method for method, kind in kinds.items() if kind in arguments.methods]

    def cell(function: str, method: str, depth: int, width: int) -> Cell:
        return Cell(function, method, depth, width, arguments.runs, arguments.epochs, arguments.seed)

    cells = []
    for function in TARGETS:
        for method in methods:
            cells += [cell(function, method, depth, arguments.width) for depth in arguments.depth]
            if paper_function(function) == "f4" and method in ("he", "rai"):
                cells.append(cell(function, method, *paper_shapes(function, method)[0]))
    swept = [method for method in ("he", "rai", sugar[0]) if arguments.sweep and method in methods]
    sweep = [cell("f1", method, depth, arguments.width) for method in swept for depth in SWEEP_DEPTHS]
    return list(dict.fromkeys(cells)), sweep


def run(cells: list[Cell], folder: Path, jobs: int) -> dict[Cell, dict[str, Any]]:
    """Train the cells that are not in the folder yet, with a progress bar on a terminal."""
    results = {}
    with progress_bars("cells") as (show,):
        for cell, result in run_cells(cells, folder, jobs):
            results[cell] = result
            show(len(results), len(cells))
    return results


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_file(path, f"[\n{lines}\n]\n")


def draw(results: list[dict[str, Any]], swept: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Write the figures of the table's cells and of the sweep."""
    shape = {"depth": arguments.depth[0], "width": arguments.width}
    combined = "bsilu" if arguments.surrogate == "all" else arguments.surrogate
    methods = ("he", "rai", f"sugar_{combined}", f"rai_sugar_{combined}")
    main_results = [r for r in results if shape.items() <= r.items() and r["method"] in methods]
    figures = {
        "figure1_gradients": paper_figures.sugar_gradients(),
        "figure1_gradients_dark": paper_figures.sugar_gradients(dark=True),
        "figure8_surrogates": paper_figures.surrogate_functions(),
        "figure7_activation": paper_figures.activation_probability(main_results),
        "losses": paper_figures.loss_histograms(main_results),
    }
    relu, sugar = (next(r for r in main_results if r["method"] == m) for m in (methods[0], methods[2]))  # both f1
    run = typical_collapse(relu, sugar)
    if run is not None:
        figures["figure6_prediction"] = paper_figures.predictions(relu, sugar, run)
    if swept:
        figures["depth"] = paper_figures.collapse_by_depth(swept)
    for name, figure in figures.items():
        save(figure, arguments.output / name)


def typical_collapse(relu: dict[str, Any], sugar: dict[str, Any]) -> int | None:
    """Among the runs that collapse with ReLU, the one with the median loss under SUGAR; None if none collapses."""
    collapsed = [
        i for i, (a, b) in enumerate(zip(relu["loss"], relu["variance"], strict=True)) if not a / b < COLLAPSED
    ]
    return sorted(collapsed, key=lambda i: sugar["loss"][i])[len(collapsed) // 2] if collapsed else None


def show(rows: list[dict[str, Any]], results: list[dict[str, Any]]) -> None:
    """Print the table with the paper's figures (`!`: differs, p < 0.05), and the CPU time of the cells."""
    table = Table(title="Percent of runs [95% interval] (paper; ! differs, p < 0.05)")
    for name in ("f", "method", "network", "A collapsed", "B partly", "C learned", "D not collapsed"):
        table.add_column(name, no_wrap=True)
    previous = None
    for row in rows:
        if previous not in (None, row["function"]):
            table.add_section()
        previous = row["function"]
        shape = f"{row['depth']}x{row['width']}"
        table.add_row(row["function"], row["method"], shape, *(quoted(row, category) for category in "ABCD"))
    Console(width=None if sys.stdout.isatty() else 150, markup=False).print(table)
    seconds, one_by_one = (sum(result[key] for result in results) for key in ("seconds", "seconds_one_by_one"))
    print(f"{len(rows)} cells in {seconds:.0f} s of CPU time; training the runs one by one takes {one_by_one:.0f} s")


def quoted(row: dict[str, Any], category: str) -> str:
    """Percent, its interval and the paper's figure, as "14 [8.5, 22.1] (15)"; "" if there is no such category."""
    if row[category] is None:
        return ""
    low, high = row["interval"][category]
    text = f"{row[category]:g} [{low:g}, {high:g}]"
    if row["paper"]:
        text += f" ({row['paper'][category]:g}{' !' if row['paper_p'][category] < 0.05 else ''})"
    return text


if __name__ == "__main__":
    main()
