"""Process many images in parallel, by processes, since the GIL limits decoding in threads."""

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

_FIRST, _PART = 16, 64  # rows computed in this process first, and rows per work item
_WORTH_PROCESSES = 0.5  # seconds; starting processes takes a tenth of that
_SAY_EVERY = 10.0  # seconds between progress lines without a terminal


def compute_rows(
    row: Callable[[int], Any], shape: tuple[int, ...], title: str | None = None, processes: int | None = None
) -> np.ndarray:
    """Return the uint8 array of this shape whose entry i is ``row(i)``.

    Long computations run in forked processes, which need no pickling and no imports, with a progress bar on standard
    error. The processes share only memory: a queue or lock could be in an inconsistent state at the time of the fork.

    Args:
        row: Function that returns an array or tensor of ``shape[1:]``.
        shape: Shape of the result, which is in shared memory.
        title: Title of the progress bar; None for no bar.
        processes: Maximum number of processes; None for one per CPU core.

    Raises:
        Exception: `row` raised it, for the smallest such i.
        OSError: a process was killed, for example because memory ran out.
    """
    count = shape[0]
    rows = _shared(shape, np.uint8)

    def fill(part: range) -> None:
        for index in part:
            rows[index] = row(index)

    head = min(_FIRST, count)
    fill(range(min(1, head)))  # the first image may trigger imports
    began = time.perf_counter()
    fill(range(1, head))
    short = (time.perf_counter() - began) / _FIRST * count < _WORTH_PROCESSES
    parts = [range(start, min(start + _PART, count)) for start in range(head, count, _PART)]
    done = _shared((len(parts),), np.bool_)
    processes = min(available_cpus() if processes is None else processes, len(parts))
    may_fork = "fork" in multiprocessing.get_all_start_methods() and not multiprocessing.current_process().daemon
    if short or processes < 2 or not may_fork:
        processes = 0

    def work(first: int) -> None:
        for number in range(first, len(parts), processes):
            fill(parts[number])
            done[number] = True

    with ExitStack() as held:
        running = [held.enter_context(_forked(work, first)) for first in range(processes)]
        # After the forks, since the progress bar starts a thread.
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
        # Everything, without processes; or the rest after an error, which raises the first error in order.
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
    """Fork a process that calls ``work(number)``, exits with status 1 if that raises, and is killed at the end."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(work, number, os.getpid()), daemon=True)
    with warnings.catch_warnings():
        # Python 3.12 warns about a fork with threads; DataLoader forks its workers with threads too.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _run(work: Callable[[int], None], number: int, parent: int) -> None:
    torch.set_num_threads(1)
    # The parent handles signals and ends its processes; if the parent is killed, `_follow` ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    try:
        work(number)
    except Exception:
        os._exit(1)
    os._exit(0)  # skips the parent's exit handlers


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
