"""Shared by the command lines: one-line errors, tables, and progress bars on a terminal."""

import argparse
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Argument parser that prints a usage error on one line and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; see {self.prog} --help\n")


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]], left: Collection[int] = (0,)) -> None:
    """Print a table; columns are right-aligned, except those whose number is in `left`."""
    lines = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        print("  ".join(cells).rstrip())


@contextmanager
def progress_bars(*tasks: str, every: float | None = None) -> Iterator[list[Callable[[int, int], None]]]:
    """Show a rich progress bar for each task on a terminal; yield one function ``update(done, total)`` per task.

    Args:
        tasks: Names of the tasks.
        every: Without a terminal, print a line after one second, then at most one every so many seconds; None: none.
    """
    if not sys.stderr.isatty() or find_spec("rich") is None:
        yield [_print_lines(task, every) for task in tasks]
        return
    import rich.progress as bars  # optional dependency
    from rich.console import Console

    # Print output above the bar; if stdout is not a terminal, leave it alone, since rich would send it to stderr.
    options: dict[str, Any] = dict(console=Console(stderr=True), redirect_stdout=sys.stdout.isatty())
    with bars.Progress(*bars.Progress.get_default_columns(), **options) as progress:

        def updater(task: bars.TaskID) -> Callable[[int, int], None]:
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield [updater(progress.add_task(task, total=None)) for task in tasks]


def _print_lines(task: str, every: float | None) -> Callable[[int, int], None]:
    due = time.monotonic() + 1

    def show(done: int, total: int) -> None:
        nonlocal due
        if every is not None and time.monotonic() >= due:
            due = time.monotonic() + every
            print(f"{task}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    return show
