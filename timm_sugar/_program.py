"""Ctrl-C and write errors on standard output, handled from the first import on when a program of this package runs.

When another program imports the package as a library, nothing is changed.
"""

import errno
import io
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any


class _Output(io.FileIO):
    """Standard output or error that does not raise when the pipe is closed or the device is full.

    Attributes:
        error: The write error, or None. After an error, all output goes to os.devnull.
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
    """Return why writing to standard output failed; "" if it did not, or if the reader closed the pipe."""
    if sys.stdout is not None:
        sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = getattr(raw, "error", None)
    return "" if error is None or isinstance(error, BrokenPipeError) else str(error.strerror)


def _is_program() -> bool:
    path = Path((sys.argv or [""])[0])
    # argv[0] is "-m" until Python has located the module of python -m.
    scripts = Path(__file__).resolve().parents[1] / "train"
    return path.name in ("-m", "timm-sugar") or path.resolve().parent == scripts


def _prepare() -> None:
    # If a standard stream is closed, the next opened file gets its descriptor, and libraries write into that file.
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
