"""Work on many images by processes: in threads, decoding waits for the interpreter's lock."""

import math
import mmap
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch

from ..terminal import progress_bars
from .images import BadImageError, LabelledImages, available_cpus, is_system_error

_FIRST, _PART = 16, 64  # rows that are computed here, and by a process at a time
_WORTH_PROCESSES = 0.5  # seconds; starting them takes a tenth of that
_SAY_EVERY = 10.0  # seconds between lines where there is no terminal


def compute_rows(
    row: Callable[[int], Any], shape: tuple[int, ...], title: str | None = None, processes: int | None = None
) -> np.ndarray:
    """Return the uint8 array of this shape whose entry i is ``row(i)``.

    Where that takes long, processes forked from this one do it, which need no pickling and no imports, under a progress
    bar on standard error. They share nothing but memory: no queue or lock, with which a fork could be caught in a wrong
    moment.

    Args:
        row: Returns an array or tensor of ``shape[1:]``.
        shape: Of the result, in memory that processes share.
        title: Stands before the bar; None for no bar.
        processes: At most; None for one a CPU core.

    Raises:
        Exception: `row` raised it, for the first i in order.
        OSError: a process was killed, as for want of memory.
    """
    count = shape[0]
    rows = _shared(shape, np.uint8)

    def fill(part: range) -> None:
        for index in part:
            rows[index] = row(index)

    head = min(_FIRST, count)
    fill(range(min(1, head)))  # loads what the first image needs
    began = time.perf_counter()
    fill(range(1, head))
    short = (time.perf_counter() - began) / _FIRST * count < _WORTH_PROCESSES
    parts = [range(start, min(start + _PART, count)) for start in range(head, count, _PART)]
    done = _shared((len(parts),), np.bool_)
    processes = min(available_cpus() if processes is None else processes, len(parts))
    if short or processes < 2 or "fork" not in multiprocessing.get_all_start_methods():
        processes = 0

    def work(first: int) -> None:
        for number in range(first, len(parts), processes):
            fill(parts[number])
            done[number] = True

    with ExitStack() as held:
        running = [held.enter_context(_forked(work, first)) for first in range(processes)]
        # After the forks, since its thread writes to standard error.
        bars = held.enter_context(progress_bars(*([] if short or title is None else [title]), every=_SAY_EVERY))

        def show() -> None:
            for bar in bars:
                bar(min(head + _PART * int(done.sum()), count), count)

        failed = False
        while running and not failed:
            wait([process.sentinel for process in running], timeout=0.1)
            status = [process.exitcode for process in running]
            if min(code or 0 for code in status) < 0:
                raise OSError("a process that decodes images was killed; is there enough memory?")
            failed = any(status)
            running = [process for process, code in zip(running, status, strict=True) if code is None]
            show()
        # Without processes everything; after an error what is not done, which raises the first error in order.
        for number in np.flatnonzero(~done):
            fill(parts[number])
            done[number] = True
            show()
    return rows


def _shared(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return zeros in memory that forked processes share."""
    size = math.prod(shape)
    return np.frombuffer(mmap.mmap(-1, max(1, size * np.dtype(dtype).itemsize)), dtype, size).reshape(shape)


@contextmanager
def _forked(work: Callable[[int], None], number: int) -> Iterator[Any]:
    """Fork a process that calls ``work(number)`` and ends with status 1 if that raises; end it if it is still there."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(work, number, os.getpid()), daemon=True)
    with warnings.catch_warnings():
        # Python 3.12 warns where there are threads; DataLoader's workers are forked beside them too.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _run(work: Callable[[int], None], number: int, parent: int) -> None:
    torch.set_num_threads(1)
    # The parent ends the others; where it is killed, they would go on for nothing.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    try:
        work(number)
    except Exception:
        os._exit(1)
    os._exit(0)  # without what the parent has left to do at its end


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def readable(images: LabelledImages, title: str | None = None) -> np.ndarray:
    """Decode every image and return the indices of those that can be, int64.

    Raises:
        BadImageError: a file cannot be read because of the file system or memory.
    """

    def check(index: int) -> bool:
        try:
            images[index]
        except BadImageError as error:
            if is_system_error(error.__cause__):
                raise
            return False
        return True

    return np.flatnonzero(compute_rows(check, (len(images),), title))
