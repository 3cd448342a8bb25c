"""What the command lines share: errors of one line, tables, and progress bars on a terminal."""

import argparse
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; see {self.prog} --help\n")


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]], left: Collection[int] = (0,)) -> None:
    """Print rows under their heads, columns aligned to the right but for those whose number is in `left`."""
    lines = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        print("  ".join(cells).rstrip())


@contextmanager
def progress_bars(*tasks: str) -> Iterator[list[Callable[[int, int], None]]]:
    """Show a bar for each task on a terminal, by rich; yield for each a function that takes steps done and in all."""
    if not sys.stderr.isatty() or find_spec("rich") is None:
        yield [lambda done, total: None for _ in tasks]
        return
    import rich.progress as bars  # comes with an extra
    from rich.console import Console

    with bars.Progress(*bars.Progress.get_default_columns(), console=Console(stderr=True)) as progress:

        def updater(task: bars.TaskID) -> Callable[[int, int], None]:
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield [updater(progress.add_task(task, total=None)) for task in tasks]
