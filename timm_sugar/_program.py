"""What holds where a program of this package runs, from its first import on: Ctrl-C, and output that cannot be written.

A library leaves both to its user, so nothing is done where somebody else's program imports the package.
"""

import io
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any


class Stream(io.TextIOWrapper):
    """A standard stream whose reader may go away, or whose device may be full, without an end to the program.

    Attributes:
        error: Why something could not be written, None so far. Then the stream goes to os.devnull.
    """

    error: OSError | None = None

    def write(self, text: str) -> int:
        """Write text, or drop it; return its length."""
        try:
            super().write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, or drop it."""
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.error = error
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.fileno())


def output_error() -> str:
    """Return why standard output could not be written, "" where it could, or where nobody reads any more."""
    if sys.stdout is not None:
        sys.stdout.flush()
    error = getattr(sys.stdout, "error", None)
    return "" if error is None or isinstance(error, BrokenPipeError) else str(error.strerror)


def _is_program() -> bool:
    path = Path((sys.argv or [""])[0])
    # "-m" is there until the module that python -m runs is found.
    scripts = Path(__file__).resolve().parents[1] / "train"
    return path.name in ("-m", "timm-sugar") or path.resolve().parent == scripts


def _prepare() -> None:
    # A standard stream that is closed leaves its number to the next file, into which libraries would then write.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for number, name in ((1, "stdout"), (2, "stderr")):
        before: Any = getattr(sys, name)
        if before is not None:
            before.flush()
        options: dict[str, Any] = dict(
            encoding=before.encoding if before is not None else "utf-8",
            errors=before.errors if before is not None else "backslashreplace",
        )
        buffer = io.BufferedWriter(io.FileIO(number, "wb", closefd=False))
        setattr(sys, name, Stream(buffer, line_buffering=True, **options))
    sys.excepthook = _without_traceback_of_ctrl_c


def _without_traceback_of_ctrl_c(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


if _is_program():
    _prepare()
