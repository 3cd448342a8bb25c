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
from contextlib import ExitStack
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch

from ..terminal import progress_bars
from .images import BadImageError, LabelledImages, available_cpus, is_system_error

_FIRST, _PART = 16, 64  # rows that are computed here, and by a process at a time
_WORTH_PROCESSES = 0.5  # seconds; starting them takes a tenth of that
_SAY_EVERY = 10.0  # seconds between lines where there is no terminal
_NONE = 2**62  # no row failed


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
    count = shape[0]
    rows = _shared(shape, np.uint8)
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
            done = _in_turn(row, rows, parts)
        else:
            done = _by_processes(row, rows, parts, processes, held)
        # After the forks, since its thread writes to standard error.
        bars = held.enter_context(progress_bars(*([] if short or title is None else [title]), every=_SAY_EVERY))
        for number in done:
            for bar in bars:
                bar(head + number, count)
    return rows


def _shared(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return zeros in memory that forked processes share."""
    size = math.prod(shape)
    return np.frombuffer(mmap.mmap(-1, max(1, size * np.dtype(dtype).itemsize)), dtype, size).reshape(shape)


def _in_turn(row: Callable[[int], Any], rows: np.ndarray, parts: list[range]) -> Iterator[int]:
    for part in parts:
        _fill(row, rows, part)
        yield part.stop - parts[0].start


def _by_processes(
    row: Callable[[int], Any], rows: np.ndarray, parts: list[range], processes: int, held: ExitStack
) -> Iterator[int]:
    """Start processes, of n each with every n-th part, and return what yields how many rows are done.

    They share nothing but memory: no queue, lock or thread, with which a fork could be caught in a wrong moment.
    """
    done = _shared((processes,), np.int64)
    failed = _shared((processes,), np.int64)
    failed[:] = _NONE
    fork = multiprocessing.get_context("fork")
    workers = [
        fork.Process(target=_work, args=(row, rows, parts[k::processes], done, failed, k, os.getpid()), daemon=True)
        for k in range(processes)
    ]
    with warnings.catch_warnings():
        # Python 3.12 warns where there are threads; DataLoader's workers are forked beside them too.
        warnings.simplefilter("ignore", DeprecationWarning)
        for worker in workers:
            worker.start()
            held.callback(_end, worker)

    def watch() -> Iterator[int]:
        running = {worker.sentinel: worker for worker in workers}
        while running:
            for sentinel in wait([*running], timeout=0.1):
                worker = running.pop(sentinel)  # type: ignore[arg-type]
                worker.join()  # its status is there a moment later
                if worker.exitcode:
                    raise OSError("a process that decodes images was killed; is there enough memory?")
            yield int(done.sum())
        first = int(failed.min())
        if first != _NONE:
            _fill(row, rows, range(first, first + 1))  # raises here what it raised there
            raise OSError(f"image {first} could not be decoded, and then could; is there enough memory?")

    return watch()


def _end(worker: Any) -> None:
    worker.kill()
    worker.join()
    worker.close()


def _work(
    row: Callable[[int], Any], rows: np.ndarray, parts: list[range], done: np.ndarray, failed: np.ndarray, k: int,
    parent: int,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    # The parent ends the others; where it is killed, they would go on for nothing.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    for part in parts:
        if part.start > failed.min():  # the first error in order is the one that counts
            break
        for index in part:
            try:
                rows[index] = row(index)
            except Exception:
                failed[k] = index
                break
        if failed[k] != _NONE:
            break
        done[k] += len(part)
    os._exit(0)  # without what the parent has left to do at its end


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


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _fill(row: Callable[[int], Any], rows: np.ndarray, part: range) -> None:
    for index in part:
        rows[index] = row(index)
