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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch

from ..terminal import progress_bars
from .images import BadImageError, LabelledImages, available_cpus, is_system_error

_FIRST, _PART = 16, 64  # rows that are computed here, and by a process at a time
_WORTH_PROCESSES = 0.5  # seconds; starting them takes a tenth of that
_SAY_EVERY = 10.0  # seconds between lines where there is no terminal

_work: tuple[Callable[[int], Any], np.ndarray]  # of a process


def compute_rows(
    row: Callable[[int], Any], shape: tuple[int, ...], title: str | None = None, processes: int | None = None
) -> np.ndarray:
    """Return the uint8 array of this shape whose entry i is ``row(i)``.

    Where that takes long, processes forked from this one do it, which need no pickling and no imports, under a progress
    bar on standard error.

    Args:
        row: Returns an array or tensor of ``shape[1:]``.
        shape: Of the result, in memory that processes share.
        title: Stands before the bar; None for no bar.
        processes: At most; None for one a CPU core.

    Raises:
        Exception: `row` raised it, for the first i in order.
        OSError: a process was killed, as for want of memory.
    """
    count, size = shape[0], math.prod(shape)
    rows = np.frombuffer(mmap.mmap(-1, max(1, size)), np.uint8, size).reshape(shape)
    head = min(_FIRST, count)
    _fill(row, rows, range(min(1, head)))  # loads what the first image needs
    began = time.perf_counter()
    _fill(row, rows, range(1, head))
    seconds = (time.perf_counter() - began) / _FIRST * count
    parts = [range(start, min(start + _PART, count)) for start in range(head, count, _PART)]
    processes = min(available_cpus() if processes is None else processes, len(parts))
    short = seconds < _WORTH_PROCESSES
    with ExitStack() as held:
        if short or processes < 2 or "fork" not in multiprocessing.get_all_start_methods():
            done: Iterator[None] = map(partial(_fill, row, rows), parts)
        else:
            fork = multiprocessing.get_context("fork")
            pool = ProcessPoolExecutor(processes, fork, _begin, (row, rows, os.getpid()))
            held.callback(pool.shutdown, cancel_futures=True)
            with warnings.catch_warnings():
                # Python 3.12 warns where there are threads; DataLoader's workers are forked beside them too.
                warnings.simplefilter("ignore", DeprecationWarning)
                done = pool.map(_fill_part, parts)
        # After the forks, since its thread writes to standard error.
        bars = held.enter_context(progress_bars(*([] if short or title is None else [title]), every=_SAY_EVERY))
        try:
            for part, _ in zip(parts, done, strict=True):
                for bar in bars:
                    bar(part.stop, count)
        except BrokenProcessPool as error:
            raise OSError("a process that decodes images was killed; is there enough memory?") from error
    return rows


def readable(images: LabelledImages, title: str | None = None) -> np.ndarray:
    """Decode every image and return the indices of those that can be, int64.

    Raises:
        BadImageError: a file cannot be read because of the file system or memory.
    """

    def check(index: int) -> int:
        try:
            images[index]
        except BadImageError as error:
            if is_system_error(error.__cause__):
                raise
            return 0
        return 1

    return np.flatnonzero(compute_rows(check, (len(images),), title))


def check_readable(images: LabelledImages, title: str | None = None) -> None:
    """Decode every image.

    Raises:
        BadImageError: one cannot be decoded; the message names its file or row.
    """
    bad = np.setdiff1d(np.arange(len(images)), readable(images, title))
    if len(bad):
        images[int(bad[0])]


def _begin(row: Callable[[int], Any], rows: np.ndarray, parent: int) -> None:
    global _work
    _work = row, rows
    torch.set_num_threads(1)
    # The parent ends the others; where it is killed, they would wait for work for ever.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _fill(row: Callable[[int], Any], rows: np.ndarray, part: range) -> None:
    for index in part:
        rows[index] = row(index)


def _fill_part(part: range) -> None:
    _fill(*_work, part)
