"""A sweep: every cell of a recipe with every seed, several at once, each in its own process and folder."""

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil  # a dependency of accelerate

from timm_sugar.settings import names_of, to_flags
from timm_sugar.surrogates import unknown_name
from timm_sugar.terminal import Parser
from timm_sugar.training.cells import Cell, run, summary_of
from timm_sugar.training.config import check_fields, load_config, read_fields
from timm_sugar.training.processes import resume_command

from .table import make_table, write_table


def main(script: str, description: str, recipe: str) -> None:
    """Run a sweep from the command line and write its table.

    Args:
        script: The ``__file__`` of train/sweep.py; cells are trained by cifar.py in the same folder.
        description: Its docstring, for --help.
        recipe: The default recipe.

    Exits with status 2 for invalid arguments, 1 if a cell failed, 75 if the time limit ended the sweep before all cells
    were finished, 143 or 130 after SIGTERM or Ctrl-C.
    """
    path = Path(script)
    parser = _parser(path.name, description, recipe)
    args, others = parser.parse_known_args()
    folder = args.output or Path("output", Path(args.recipe).stem)
    try:
        cells = plan(path, args.recipe, folder, args.seeds, args.cells, others)
        if args.jobs is not None and args.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {args.jobs}")
        if not args.minutes > 0:
            raise ValueError(f"minutes must be above 0, got {args.minutes:g}")
        spent = time.time() - psutil.Process().create_time()  # mostly in imports
        failures = {} if args.table_only else run(cells, args.jobs, args.minutes - spent / 60)
        summaries = [(cell.name, cell.config.seed, summary_of(cell)) for cell in cells]
        paper = {name: cell.get("paper") for name, cell in read_grid(args.recipe).items()}
        table = make_table(Path(args.recipe).stem, summaries, paper, _command(args, others))
        write_table(table, folder, args.into)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.exit(2, f"{path.name}: error: {' '.join(str(error).split())}\n")
    print((folder / "table.md").read_text(encoding="utf-8"))
    for cell, reason in failures.items():
        print(f"{path.name}: {cell} failed: {reason}", file=sys.stderr)
    left = len(table["missing"]) - len(failures)
    if left and not args.table_only:
        print(
            f"{path.name}: time is up, {left} cells are not finished; go on with: {resume_command()}", file=sys.stderr
        )
        raise SystemExit(os.EX_TEMPFAIL)
    raise SystemExit(1 if failures else 0)


def _parser(prog: str, description: str, recipe: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other flags are those of train/cifar.py and are passed to each cell.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe", default=recipe, help=f"name or YAML file of a recipe with a grid (default {recipe})"
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="default: the recipe's")
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="default: all of the recipe")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="cells at once (default: one per CPU core, or one on a GPU)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        metavar="M",
        help="save and exit before M minutes have passed, with exit status 75 and the command that resumes",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="a cell is in DIR/seedN/NAME (default output/RECIPE)"
    )
    parser.add_argument("--table-only", action="store_true", help="train nothing; write the table of finished cells")
    parser.add_argument("--into", type=Path, metavar="FILE", help="also write the table into this Markdown file")
    return parser


def _command(args: argparse.Namespace, others: Sequence[str]) -> str:
    """Return the command line without paths of data and output."""
    given = {"recipe": Path(args.recipe).stem, "seeds": args.seeds, "cells": args.cells}
    flags = to_flags({name: value for name, value in given.items() if value})
    rest = list(others)
    if "--data" in rest:
        del rest[(at := rest.index("--data")) : at + 2]
    return shlex.join(["python", "train/sweep.py", *flags, *(flag for flag in rest if not flag.startswith("--data="))])


def plan(
    script: Path,
    recipe: str,
    folder: Path,
    seeds: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    others: Sequence[str] = (),
) -> list[Cell]:
    """Return the cells of a sweep, all of the first seed first.

    Args:
        script: train/sweep.py; cifar.py is in the same folder.
        recipe: Name or file of a recipe that has a grid.
        folder: A cell's folder is ``folder/seedN/NAME``.
        seeds: None for the recipe's.
        names: Cells; None for all.
        others: Flags passed to every cell.

    Raises:
        ValueError: an unknown recipe, cell or flag, or a wrong value.
    """
    for flag in (flag.split("=")[0] for flag in others):
        if flag == "--seed":
            raise ValueError("a sweep takes --seeds, not --seed")
        if flag.removeprefix("--").replace("-", "_") in names_of("start"):
            raise ValueError(f"{flag} is not for a sweep")
    settings = read_grid(recipe)
    for name in names or ():
        if name not in settings:
            raise ValueError(unknown_name("cell", name, list(settings)))
    base = ["--recipe", recipe, *others]
    cells = []
    for seed in dict.fromkeys(seeds or [load_config(base, script.name, "", recipe).seed]):
        for name in dict.fromkeys(names or settings):
            own = {"seed": seed, "output": folder / f"seed{seed}" / name} | settings[name]
            argv = [*base, *to_flags({key: value for key, value in own.items() if key != "paper"})]
            config = load_config(argv, script.name, "", recipe)
            cells.append(Cell(name, config, (str(script.with_name("cifar.py")), *argv)))
    return cells


def read_grid(recipe: str) -> dict[str, dict[str, Any]]:
    """Return the cells of a recipe's grid by name: settings that override its own, and the paper's figure.

    Raises:
        ValueError: the recipe has no grid, or a cell has an unknown field.
    """
    cells = read_fields(recipe).get("grid")
    if not isinstance(cells, dict) or not all(isinstance(cell, dict) for cell in cells.values()):
        raise ValueError(f"recipe {recipe} has no grid: a mapping of cell names to settings")
    for name, cell in cells.items():
        check_fields(f"recipe {recipe}, cell {name}", cell, "paper")
        paper = cell.get("paper", [1.0, 0.0])
        if not isinstance(paper, list) or len(paper) != 2 or not 0 < paper[0] <= 1:
            raise ValueError(f"recipe {recipe}, cell {name}: paper must be accuracy and its std as fractions of 1")
    return {str(name): cell for name, cell in cells.items()}
