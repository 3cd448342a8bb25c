"""A sweep: stopped and gone on with, cells that fail, cells that somebody else trains; and its table."""

import fcntl
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from paper.sweep import main, plan, run
from paper.table import make_table, markdown, write_table
from tests.conftest import image_folder
from timm_sugar.training import train

SCRIPT = Path(__file__).parents[2] / "train" / "sweep.py"
RECIPE = """
data: digits
limit_train: 64
limit_val: 20
img_size: 16
batch_size: 16
model_args: {channels: [8, 8, 8, 8]}
epochs: 12
grid:
  relu: {act_layer: relu, paper: [0.7, 0.01]}
  elu: {act_layer: elu, paper: [0.75, 0.02]}
  sugar_elu: {surrogate: elu, paper: [0.9, 0.03]}
"""


@pytest.fixture
def recipe(tmp_path) -> str:
    (tmp_path / "small.yaml").write_text(RECIPE)
    return str(tmp_path / "small.yaml")


def _wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, "what was waited for did not come"
        time.sleep(0.02)


def _is_locked(path: Path) -> bool:
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _weights(output) -> bytes:
    return Path(output, "model/model.safetensors").read_bytes()


def test_stopped_and_gone_on_with(recipe, tmp_path, capsys):
    done, cell = plan(SCRIPT, recipe, tmp_path / "sweep", [1], ["elu", "relu"])
    train(done.config)
    before = Path(done.config.output, "summary.json").stat().st_mtime_ns
    output = Path(cell.config.output)

    def stop_in_the_middle() -> None:
        _wait_for((output / "metrics.jsonl").exists)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop_in_the_middle)
    watcher.start()
    with pytest.raises(SystemExit) as stopped:
        run([done, cell], jobs=2)
    watcher.join()
    assert stopped.value.code == 143
    assert "run the same command to resume" in capsys.readouterr().err
    assert any((output / "checkpoints").glob("step-*/manifest.json"))
    assert not (output / "summary.json").exists()
    assert not _is_locked(Path(f"{output}.log"))  # its process is gone

    assert run([done, cell], jobs=2) == {}
    assert "2 cells, 1 of them finished" in capsys.readouterr().err
    assert Path(done.config.output, "summary.json").stat().st_mtime_ns == before
    whole = plan(SCRIPT, recipe, tmp_path / "whole", [1], ["relu"])[0].config
    train(whole)
    assert _weights(output) == _weights(whole.output)


def _clock(monkeypatch, reached: Callable[[], bool], seconds: float) -> None:
    """A clock for sweeps that stands at 0 until something is reached, and then at `seconds`."""
    clock = SimpleNamespace(monotonic=lambda: seconds if reached() else 0.0, sleep=time.sleep)
    monkeypatch.setattr("timm_sugar.training.cells.time", clock)


def test_ended_before_its_time_is_up_and_carried_elsewhere(recipe, tmp_path, monkeypatch, capsys):
    data = image_folder(tmp_path / "data", 90, ("train", "test"))
    argv = ["--recipe", recipe, "--cells", "relu", "sugar_elu", "--jobs", "1", "--epochs", "40"]
    here, there = tmp_path / "here", tmp_path / "there"
    with monkeypatch.context() as patch:
        patch.setattr("paper.sweep.psutil.Process", lambda: SimpleNamespace(create_time=time.time))
        _clock(patch, (here / "seed42" / "relu" / "metrics.jsonl").exists, 60 * 10 - 59)
        assert _main(monkeypatch, *argv, "--data", data, "--output", here, "--minutes", 10) == 75
    err = capsys.readouterr().err
    command = shlex.join(["train/sweep.py", *argv, "--data", data, "--output", str(here), "--minutes", "10"])
    assert err.splitlines()[-1].endswith(
        f"sweep.py: time is up, 2 cells are not finished; go on with: python {command}"
    )
    assert "seed42/relu stopped" in err
    assert "sugar_elu started" not in err
    assert "**Not finished: seed42/relu, seed42/sugar_elu.**" in (here / "table.md").read_text()
    assert "saved; resume with" in (here / "seed42" / "relu.log").read_text()

    here.rename(there)
    shutil.move(data, tmp_path / "elsewhere")
    assert _main(monkeypatch, *argv, "--data", tmp_path / "elsewhere", "--output", there) == 0
    assert "Not finished" not in (there / "table.md").read_text()
    others = ["--data", str(tmp_path / "elsewhere"), "--epochs", "40"]
    for cell in plan(SCRIPT, recipe, tmp_path / "whole", None, ["relu", "sugar_elu"], others):
        train(cell.config)
        assert _weights(there / "seed42" / cell.name) == _weights(cell.config.output)


def test_time_is_counted_from_the_start_of_the_process(recipe, tmp_path, monkeypatch, capsys):
    earlier = SimpleNamespace(create_time=lambda: time.time() - 10 * 60)
    monkeypatch.setattr("paper.sweep.psutil.Process", lambda: earlier)
    assert _main(monkeypatch, "--recipe", recipe, "--output", tmp_path / "sweep", "--minutes", 10) == 75
    err = capsys.readouterr().err
    assert "started" not in err
    assert "time is up, 3 cells are not finished; go on with: python train/sweep.py --recipe" in err


@pytest.mark.parametrize(("ends", "seconds_left"), [("does not end", 29), ("leaves a process behind", 59)])
def test_a_stopped_cell_is_gone_with_what_it_started(ends, seconds_left, recipe, fake_script, tmp_path, monkeypatch):
    ready = tmp_path / "ready"
    fake_script.with_name("cifar.py").write_text(
        "import os, pathlib, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork():\n"
        f"    if {ends == 'leaves a process behind'}: signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
        f"    pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(3600)\n"
    )
    cells = plan(fake_script, recipe, tmp_path / "sweep", names=["elu", "relu"])
    _clock(monkeypatch, ready.exists, 60 * 10 - seconds_left)  # killed from 30 on
    assert run(cells, jobs=1, minutes=10) == {}
    assert not _is_locked(Path(f"{cells[0].config.output}.log"))  # which the second process had open, too
    assert not Path(f"{cells[1].config.output}.log").exists()


@pytest.fixture
def fake_script(tmp_path) -> Path:
    """A train/sweep.py beside which cifar.py fails for relu, and for the others waits for a file, where told to."""
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "cifar.py").write_text(
        "import sys, time, pathlib\n"
        "go = pathlib.Path(__file__).with_name('go')\n"
        "while 'wait' in go.read_text(): time.sleep(0.02)\n"
        "if 'relu' in sys.argv: sys.exit('first line\\nno such data')\n"
    )
    (folder / "go").write_text("now")
    return folder / "sweep.py"


def test_a_failed_cell_is_named_and_the_others_go_on(recipe, fake_script, tmp_path, capsys):
    failures = run(plan(fake_script, recipe, tmp_path / "sweep"), jobs=1)
    assert {str(cell): why for cell, why in failures.items()} == {"seed42/relu": "exit status 1: no such data"}
    assert "seed42/sugar_elu finished" in capsys.readouterr().err


def test_a_cell_has_one_process_at_a_time(recipe, fake_script, tmp_path):
    (cell,) = plan(fake_script, recipe, tmp_path / "sweep", names=["elu"])
    go = fake_script.with_name("go")
    go.write_text("wait")
    first = threading.Thread(target=run, args=([cell],))  # in a thread, signals are not touched
    first.start()
    try:
        _wait_for(lambda: _is_locked(Path(f"{cell.config.output}.log")))
        assert run([cell]) == {cell: "another process is training it"}
    finally:
        go.write_text("now")
        first.join()
    assert run([cell]) == {}


def _main(monkeypatch, *argv: object) -> int:
    monkeypatch.setattr(sys, "argv", ["train/sweep.py", *map(str, argv)])
    with pytest.raises(SystemExit) as done:
        main(str(SCRIPT), "text", "table4_small")
    return done.value.code


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cells", "rleu"], "unknown cell 'rleu'; did you mean 'relu'"),
        (["--seed", "1"], "a sweep takes --seeds, not --seed"),
        (["--push-to-hub=a/b"], "--push-to-hub is not for a sweep"),
        (["--epoch", "3"], "did you mean '--epochs'"),
        (["--recipe", "digits"], "recipe digits has no grid"),
        (["--jobs", "0"], "jobs must be at least 1"),
        (["--minutes", "0"], "minutes must be above 0, got 0"),
        (["--minutes", "nan"], "minutes must be above 0, got nan"),
    ],
)
def test_usage_errors(argv, message, monkeypatch, capsys):
    assert _main(monkeypatch, *argv) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["table", "seeds"])
def test_results_quote_the_committed_tables(name):
    root = SCRIPT.parents[1]
    table = json.loads((root / "docs" / "table4-small" / f"{name}.json").read_text())
    page = (root / "RESULTS.md").read_text()
    assert markdown(table).strip() in page
    for cell in table["cells"] if name == "seeds" else ():
        if "gain" in cell:
            gain = f"{100 * cell['gain']:+.2f} ± {100 * cell['gain_interval']:.2f}"
            above = cell["gain"] > cell["gain_interval"]
            assert above == (cell["name"] in ("sugar_bsilu", "sugar_elu", "sugar_gelu"))
            assert above or f"({gain})" in " ".join(page.split())


def test_settings_that_differ_are_refused(recipe, tmp_path, monkeypatch, capsys):
    (cell,) = plan(SCRIPT, recipe, tmp_path / "sweep", names=["elu"], others=["--epochs", "1"])
    train(cell.config)
    assert _main(monkeypatch, "--recipe", recipe, "--output", tmp_path / "sweep", "--table-only") == 2
    assert "holds a run with epochs=1, not 12" in capsys.readouterr().err
    arguments = ("--recipe", recipe, "--output", tmp_path / "sweep", "--epochs", "1", "--table-only")
    (tmp_path / "page.md").write_text("before\n<!-- small -->\nold\n<!-- /small -->\nafter\n")
    assert _main(monkeypatch, *arguments, "--data", "elsewhere/digits", "--into", tmp_path / "page.md") == 0
    shown = (tmp_path / "sweep/table.md").read_text()
    assert "**Not finished: seed42/relu, seed42/sugar_elu.**" in shown
    assert "`python train/sweep.py --recipe small --epochs 1`" in shown
    top1 = json.loads(Path(cell.config.output, "summary.json").read_text())["test_top1"]
    assert f"| elu | {100 * top1:.2f} |  |  | 75.00 ± 2.00 | 90.00 ± 3.00 | +15.00 |" in shown
    assert (tmp_path / "page.md").read_text() == f"before\n<!-- small -->\n\n{shown}\n<!-- /small -->\nafter\n"
    assert not (tmp_path / "sweep/bars.png").exists()  # ReLU, their baseline, is not finished


def _summary(top1: float) -> dict:
    same = dict(model="net", epochs=10, train_images=45000, val_images=5000, test_images=10000, versions={"torch": "2"})
    return same | dict(data="data/cifar10", seconds=1800, test_top1=top1)


PAPER = {"relu": (0.7, 0.01), "elu": (0.75, 0.02), "sugar_elu": (0.9, 0.03)}


def test_table(tmp_path):
    runs = {("relu", 1): 0.5, ("relu", 2): 0.6, ("elu", 1): 0.58, ("elu", 2): 0.7, ("sugar_elu", 2): 0.8}
    names = ["relu", "elu", "sugar_elu"]
    given = [(n, s, _summary(runs[n, s]) if (n, s) in runs else None) for s in (1, 2) for n in names]
    table = make_table("small", given, PAPER, "the command")
    relu, elu, sugar = table["cells"]
    assert relu["mean"] == pytest.approx(0.55)
    assert relu["interval"] == pytest.approx(12.7062 * 0.05, rel=1e-5)  # t of one degree of freedom
    assert (sugar["mean"], sugar["interval"], sugar["accuracy"]) == (0.8, None, {2: 0.8})
    assert sugar["gain"] == pytest.approx(0.1)  # against the same seed
    assert (sugar["paper_gain"], "gain" in elu) == (0.15, False)
    assert (table["missing"], table["hours"], table["spearman"]) == (["seed1/sugar_elu"], 2.5, 1.0)
    shown = markdown(table)
    assert "| elu | 64.00 ± 76.24 | 80.00 (1 of 2 seeds) | +10.00 | 75.00 ± 2.00 | 90.00 ± 3.00 | +15.00 |" in shown
    assert "| relu | 55.00 ± 63.53 |  |  | 70.00 ± 1.00 |  |  |" in shown
    for note in (
        "`net` on cifar10: 45,000 training",
        "10 epochs",
        "2.5 hours",
        "correlation with the paper's",
        "torch 2",
    ):
        assert note in shown


@pytest.mark.parametrize("seeds", [[1], [1, 2]])
def test_the_picture_of_a_table_says_what_it_shows(seeds, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("timm_sugar.analysis.plots.save", lambda figure, path: drawn.append(figure.get_suptitle()))
    write_table(make_table("small", [("relu", seed, _summary(0.5)) for seed in seeds], PAPER, ""), tmp_path)
    assert drawn == [f"small: cifar10, 10 epochs, {'seed 1' if seeds == [1] else 'seeds 1, 2'}"]


def test_rank_correlation_has_the_sign_of_the_order():
    backwards = [(name, 1, _summary(1 - PAPER[name][0])) for name in PAPER]
    assert make_table("small", backwards, PAPER, "")["spearman"] == -1.0
    assert make_table("small", backwards[:2], PAPER, "")["spearman"] is None


def test_a_table_of_nothing(tmp_path):
    table = make_table("small", [("relu", 1, None)], PAPER, "the command")
    write_table(table, tmp_path)
    assert "**Not finished: seed1/relu.**" in (tmp_path / "table.md").read_text()
    with pytest.raises(ValueError, match="does not hold <!-- small -->"):
        write_table(table, tmp_path, tmp_path / "table.md")
