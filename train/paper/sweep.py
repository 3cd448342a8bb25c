"""A sweep: every cell of a recipe with every seed, several at once, each in a process and a folder of its own."""

import argparse
import dataclasses
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_sugar.data import available_cpus
from timm_sugar.files import read_mapping
from timm_sugar.settings import TrainConfig, names_of, to_flags
from timm_sugar.surrogates import unknown_name
from timm_sugar.terminal import Parser
from timm_sugar.training.config import check_fields, load_config, read_fields
from timm_sugar.training.folder import read_finished
from timm_sugar.training.processes import on_cpu, stop_signals

from .table import make_table, write_table


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a sweep.

    Attributes:
        name: As in the recipe.
        seed: Of the run.
        config: All its settings.
        command: Script and arguments that train it.
    """

    name: str
    seed: int
    config: TrainConfig
    command: tuple[str, ...]

    def __str__(self) -> str:
        return f"seed{self.seed}/{self.name}"


def main(script: str, description: str, recipe: str) -> None:
    """Run a sweep from the command line and write its table.

    Args:
        script: The ``__file__`` of train/sweep.py; cells are trained by cifar.py beside it.
        description: Its docstring, for --help.
        recipe: The default recipe.

    Exits with status 2 where the arguments are wrong, 1 where a cell failed, 143 or 130 after SIGTERM or Ctrl-C.
    """
    path = Path(script)
    parser = _parser(path.name, description, recipe)
    args, others = parser.parse_known_args()
    folder = args.output or Path("output", Path(args.recipe).stem)
    try:
        cells = plan(path, args.recipe, folder, args.seeds, args.cells, others)
        if args.jobs is not None and args.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {args.jobs}")
        failures = {} if args.table_only else run(cells, args.jobs)
        summaries = [(cell.name, cell.seed, _summary(cell)) for cell in cells]
        paper = {name: cell.get("paper") for name, cell in read_grid(args.recipe).items()}
        table = make_table(Path(args.recipe).stem, summaries, paper, _command(args, others))
        write_table(table, folder, args.into)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.exit(2, f"{path.name}: error: {' '.join(str(error).split())}\n")
    print((folder / "table.md").read_text(encoding="utf-8"))
    for cell, reason in failures.items():
        print(f"{path.name}: {cell} failed: {reason}", file=sys.stderr)
    raise SystemExit(1 if failures else 0)


def _parser(prog: str, description: str, recipe: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every other flag is one of train/cifar.py and goes to each cell.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe", default=recipe, help=f"name or YAML file of a recipe with a grid (default {recipe})"
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="default: the recipe's")
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="default: all of the recipe")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="cells at once (default: one a CPU core, or one on a GPU)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="a cell is in DIR/seedN/NAME (default output/RECIPE)"
    )
    parser.add_argument("--table-only", action="store_true", help="train nothing; write the table of what is finished")
    parser.add_argument("--into", type=Path, metavar="FILE", help="put the table into this Markdown file too")
    return parser


def _command(args: argparse.Namespace, others: Sequence[str]) -> str:
    """Return the command line without what only says where things are."""
    given = ["--recipe", Path(args.recipe).stem]
    for name in ("seeds", "cells"):
        if getattr(args, name):
            given += [f"--{name}", *map(str, getattr(args, name))]
    rest = list(others)
    if "--data" in rest:
        del rest[(at := rest.index("--data")) : at + 2]
    return shlex.join(["python", "train/sweep.py", *given, *(flag for flag in rest if not flag.startswith("--data="))])


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
        script: train/sweep.py; cifar.py is beside it.
        recipe: Name or file of a recipe that has a grid.
        folder: A cell's folder is ``folder/seedN/NAME``.
        seeds: None for the recipe's.
        names: Cells; None for all.
        others: Flags that go to every cell.

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
            cells.append(Cell(name, seed, config, (str(script.with_name("cifar.py")), *argv)))
    return cells


def read_grid(recipe: str) -> dict[str, dict[str, Any]]:
    """Return the cells of a recipe's grid by name: settings that override its own, and the paper's figure.

    Raises:
        ValueError: it has none, or one of them has an unknown field.
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


def run(cells: Sequence[Cell], jobs: int | None = None) -> dict[Cell, str]:
    """Train the unfinished cells, one process each; a failed cell does not stop the others.

    Args:
        cells: See `plan`.
        jobs: Cells at once, which share the CPU's cores unless OMP_NUM_THREADS says otherwise; None for one a core, or
            one alone where there is a GPU.

    Returns:
        Why each cell that failed did.

    Raises:
        SystemExit: SIGTERM or SIGINT came; all cells have saved their state and stopped; another call resumes them.
    """
    failures: dict[Cell, str] = {}
    waiting: deque[Cell] = deque()
    for cell in cells:
        try:
            if read_finished(cell.config) is None:
                waiting.append(cell)
        except ValueError as error:
            failures[cell] = str(error)
    jobs = jobs or (available_cpus() if on_cpu() else 1)
    environment = {"OMP_NUM_THREADS": str(max(1, available_cpus() // jobs))} | os.environ
    _say(f"{len(cells)} cells, {len(cells) - len(waiting) - len(failures)} of them finished")
    running: dict[subprocess.Popen[bytes], Cell] = {}
    with stop_signals() as stop:
        try:
            while (waiting and not stop.number) or running:
                while waiting and len(running) < jobs and not stop.number:
                    cell = waiting.popleft()
                    try:
                        running[_start(cell, environment)] = cell
                        _say(f"{cell} started, {len(waiting)} to come")
                    except BlockingIOError:
                        failures[cell] = "another process is training it"
                if stop.number:
                    _stop(running)
                for process in [process for process in running if process.poll() is not None]:
                    cell = running.pop(process)
                    if process.returncode and not stop.number:
                        failures[cell] = f"exit status {process.returncode}: {_last_line(_log(cell))}"
                    _say(f"{cell} {'stopped' if process.returncode else 'finished'}")
                time.sleep(0.05)
        finally:
            _stop(running)
    if stop.number:
        _say("stopped; run the same command to resume")
        raise SystemExit(128 + stop.number)
    return failures


def _start(cell: Cell, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a cell, whose log is locked for as long as its process lives, even if this one is killed.

    Raises:
        BlockingIOError: another process is training it.
    """
    _log(cell).parent.mkdir(parents=True, exist_ok=True)
    with _log(cell).open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        command = [sys.executable, *cell.command]
        # A session of its own: Ctrl-C would reach it besides the signal from here, and a second one ends it at once.
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _stop(running: dict[subprocess.Popen[bytes], Cell]) -> None:
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process in running:
        process.wait()


def _log(cell: Cell) -> Path:
    return Path(f"{cell.config.output}.log")


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _summary(cell: Cell) -> dict[str, Any] | None:
    """Return the summary of a finished cell, wherever its data was when it was trained."""
    path = Path(f"{cell.config.output}", "config.yaml")
    if not path.is_file():
        return None
    data = read_mapping(path)["data"]
    return read_finished(dataclasses.replace(cell.config, data=data, resume="auto"))
