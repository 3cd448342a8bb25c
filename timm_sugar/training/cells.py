"""A grid of runs, several in parallel, each in its own process and folder; can be stopped and resumed at any time."""

import dataclasses
import fcntl
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import available_cpus
from ..settings import TrainConfig
from .folder import read_finished, read_record
from .processes import on_cpu, stop_signals


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a grid."""

    name: str  # of the run, without the seed
    config: TrainConfig
    command: tuple[str, ...]  # arguments of Python that train it: a script or module and its arguments

    def __str__(self) -> str:
        return f"seed{self.config.seed}/{self.name}"

    @property
    def log(self) -> Path:
        """The file with the output of its process, next to its folder."""
        return Path(f"{self.config.output}.log")


def run(cells: Sequence[Cell], jobs: int | None = None, minutes: float = math.inf) -> dict[Cell, str]:
    """Train the unfinished cells, one process each; a failed cell does not stop the others.

    Args:
        jobs: Number of parallel cells. They share the CPU's cores unless OMP_NUM_THREADS is set. None for one per
            core, or a single one if there is a GPU.
        minutes: Time limit of this call. A minute before it, or after half of it if that is later, unfinished cells
            receive SIGTERM to save their state and stop. Cells still running after half of the remaining time are
            killed and lose the steps since their last checkpoint. Another call resumes them.

    Returns:
        The reason of failure for each failed cell. Cells that are neither in it nor finished were stopped or not
        started.

    Raises:
        SystemExit: SIGTERM or SIGINT was received; all cells saved their state and stopped; another call resumes them.
    """
    reserve = min(60.0, 30 * minutes)
    ends = time.monotonic() + 60 * minutes - reserve
    failures: dict[Cell, str] = {}
    waiting: deque[Cell] = deque()
    for cell in cells:
        try:
            if summary_of(cell) is None:
                waiting.append(cell)
        except ValueError as error:
            failures[cell] = str(error)
    jobs = jobs or (available_cpus() if on_cpu() else 1)
    environment = {"OMP_NUM_THREADS": str(max(1, available_cpus() // jobs))} | os.environ
    _say(f"{len(cells)} cells, {len(cells) - len(waiting) - len(failures)} of them finished")
    running: dict[subprocess.Popen[bytes], Cell] = {}
    with stop_signals() as stop:

        def over() -> bool:
            return stop.number > 0 or time.monotonic() >= ends

        try:
            while (waiting and not over()) or running:
                while waiting and len(running) < jobs and not over():
                    cell = waiting.popleft()
                    try:
                        running[_start(cell, environment)] = cell
                        _say(f"{cell} started, {len(waiting)} to come")
                    except BlockingIOError:
                        failures[cell] = "another process is training it"
                if over():
                    _stop(running, math.inf if stop.number else ends + reserve / 2)
                for process in [process for process in running if process.poll() is not None]:
                    cell = running.pop(process)
                    if process.returncode and not over():
                        failures[cell] = f"exit status {process.returncode}: {last_line(cell)}"
                    _say(f"{cell} {'stopped' if process.returncode else 'finished'}")
                time.sleep(0.05)
        finally:
            _stop(running, math.inf)
    if stop.number:
        _say("stopped; run the same command to resume")
        raise SystemExit(128 + stop.number)
    return failures


def summary_of(cell: Cell) -> dict[str, Any] | None:
    """Return the summary of a finished cell, even if its data has moved since; None if it is unfinished."""
    record = read_record(cell.config.folder)
    if record is None:
        return None
    return read_finished(dataclasses.replace(cell.config, data=record["data"], resume="auto"))


def _start(cell: Cell, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a cell; its process holds a lock on the log. BlockingIOError if another process trains this cell."""
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    with cell.log.open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        command = [sys.executable, *cell.command]
        # A new session: otherwise Ctrl-C would reach the cell in addition to our signal, and a second signal kills it.
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _stop(running: dict[subprocess.Popen[bytes], Cell], until: float) -> None:
    """Stop cells with SIGTERM, kill those that run longer than `until`, and kill their remaining child processes."""
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process, cell in running.items():
        try:
            process.wait(None if until == math.inf else max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            _say(f"{cell} does not stop and is killed")
        with suppress(ProcessLookupError):  # a child process, such as a compiler, would keep the lock on the log
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_line(cell: Cell) -> str:
    """Return the last line that the process of a cell wrote."""
    text = cell.log.read_text(encoding="utf-8", errors="replace") if cell.log.is_file() else ""
    return text.rstrip().rpartition("\n")[2] or "it said nothing"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
