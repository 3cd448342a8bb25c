"""Work by processes: the same rows, the first error in order, and nobody left over."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from timm_sugar.data import BadImageError
from timm_sugar.data.parallel import compute_rows

COUNT = 1000


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr("timm_sugar.data.parallel._WORTH_PROCESSES", 0.0)


def _row(index: int) -> np.ndarray:
    return np.array([index % 251, *os.getpid().to_bytes(4, "little")], np.uint8)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_rows_are_the_same_whoever_computes_them(processes):
    rows = compute_rows(_row, (COUNT, 5), processes=processes)
    np.testing.assert_array_equal(rows[:, 0], np.arange(COUNT) % 251)
    own = list(os.getpid().to_bytes(4, "little"))
    others = {tuple(row) for row in rows[16:, 1:]}
    assert others == {tuple(own)} if processes == 1 else tuple(own) not in others


@pytest.mark.parametrize("count", [0, 1, 16, 17, 80, 81])
def test_any_number_of_rows(count):
    np.testing.assert_array_equal(compute_rows(_row, (count, 5), processes=2)[:, 0], np.arange(count))


def test_what_is_soon_done_needs_no_processes(monkeypatch):
    monkeypatch.setattr("timm_sugar.data.parallel._WORTH_PROCESSES", 3600.0)
    assert len({tuple(row) for row in compute_rows(_row, (COUNT, 5), processes=2)[:, 1:]}) == 1


DAEMON = """
import multiprocessing
import numpy as np
from timm_sugar.data import parallel
parallel._WORTH_PROCESSES = 0.0
def work():
    rows = parallel.compute_rows(lambda index: np.array([index], np.uint8), (200, 1), processes=2)
    raise SystemExit(0 if rows[:, 0].tolist() == list(range(200)) else 3)
process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
process.start()
process.join()
raise SystemExit(process.exitcode)
"""


def test_a_daemonic_process_computes_alone():
    """It may have no children, as in a pool's worker."""
    done = subprocess.run([sys.executable, "-c", DAEMON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_error_in_order_is_raised(processes):
    def row(index):
        if index in (200, 201, 900):
            raise BadImageError(f"image {index}")
        return _row(index)

    with pytest.raises(BadImageError, match=r"^image 200$"):
        compute_rows(row, (COUNT, 5), processes=processes)


def test_a_process_that_is_killed_is_an_error_of_one_line():
    def row(index):
        if index == 500:
            os.kill(os.getpid(), signal.SIGKILL)
        return _row(index)

    with pytest.raises(OSError, match=r"^a process that decodes images was killed; is there enough memory\?$"):
        compute_rows(row, (COUNT, 5), processes=2)


KILLED = """
import os, time
from timm_sugar.data import parallel

def row(index):
    if os.getpid() != parent:
        print(os.getpid(), flush=True)
        time.sleep(3600)
    return 0

parent, parallel._WORTH_PROCESSES = os.getpid(), 0.0
parallel.compute_rows(row, (1000,), processes=2)
"""


def test_processes_end_with_the_one_that_started_them():
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert len({process.stdout.readline() for _ in range(2)}) == 2
        process.kill()
        process.communicate(timeout=60)  # standard output is open for as long as they live


def test_lines_where_there_is_no_terminal(monkeypatch, capsys):
    seconds = iter(np.arange(0, 1000, 0.25))
    monkeypatch.setattr("timm_sugar.terminal.time.monotonic", lambda: float(next(seconds)))
    compute_rows(_row, (16 + 64 * 8, 5), title="decoding", processes=1)
    # Read once at the start, once a part, and again where a line is printed.
    assert capsys.readouterr().err == "decoding: 272 of 528\n"
