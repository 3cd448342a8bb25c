"""What holds where a program of this package runs, from its first import on: Ctrl-C, and output that cannot be written.

A library leaves both to its user, so nothing is done where somebody else's program imports the package.
"""

import errno
import io
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any


class _Output(io.FileIO):
    """Standard output or error, whose reader may go away, or whose device may be full, without an end to the program.

    Attributes:
        error: Why something could not be written, None so far. Then all goes to os.devnull.
    """

    error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            written: int | None = super().write(content)
            if written is None:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            return written
        except OSError as error:
            self.error = error
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            return len(content)


def output_error() -> str:
    """Return why standard output could not be written, "" where it could, or where nobody reads any more."""
    if sys.stdout is not None:
        sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = getattr(raw, "error", None)
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
        before = getattr(sys, name)
        if before is None:
            encoding, errors = "utf-8", "backslashreplace"
        else:
            encoding, errors = before.encoding, before.errors
            before.flush()
        buffer = io.BufferedWriter(_Output(number, "wb", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, encoding, errors, line_buffering=True))
    sys.excepthook = _without_traceback_of_ctrl_c


def _without_traceback_of_ctrl_c(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


if _is_program():
    _prepare()
