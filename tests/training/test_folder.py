"""The folder of a run: which of its results count, which checkpoints are gone on from, and what is set aside."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from timm_sugar.cli import main as command
from timm_sugar.files import write_file
from timm_sugar.training import Stopped, TrainConfig, train
from timm_sugar.training.checkpoint import latest_checkpoint, list_checkpoints, read_state
from timm_sugar.training.progress import Progress

LOOP = sys.modules["timm_sugar.training.train"]  # the function has the same name


def _config(output, **settings):
    defaults = dict(limit_train=64, limit_val=20, img_size=16, batch_size=16, epochs=2, workers=0)
    model_args = {"channels": [8, 8, 8, 8]}
    return TrainConfig(data="digits", output=str(output), model_args=model_args, **defaults | settings)


def _weights(run):
    return (run / "model" / "model.safetensors").read_bytes()


def _steps(run):
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(run / "checkpoints")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs of two seeds: 7 and 42."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (7, 42):
        train(_config(folder / str(seed), seed=seed))
    return folder


@pytest.fixture
def finished(runs, tmp_path):
    """A copy of the run of seed 7."""
    return Path(shutil.copytree(runs / "7", tmp_path / "run"))


@pytest.fixture
def stop_at(monkeypatch):
    """Have SIGTERM arrive after a number of steps of a start."""

    def arrange(steps):
        count = iter(range(1, 1000))

        def step(self, *arguments, **more):
            if next(count) == steps:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Progress, "step", step)

    return arrange


def _content(run):
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("seed", [7, 42])
def test_another_runs_checkpoint_does_not_make_a_finished_folder_its_own(runs, finished, seed):
    other = latest_checkpoint(runs / "42" / "checkpoints")
    before = _content(finished)
    with pytest.raises(ValueError, match=f"^{finished if seed == 42 else other} holds a run with seed=") as caught:
        train(_config(finished, seed=seed, resume=str(other)))
    assert f"seed={49 - seed}, not {seed}; give another --output" in str(caught.value)
    assert _content(finished) == before


def test_without_its_settings_a_run_is_compared_with_its_checkpoint(runs, finished):
    (finished / "config.yaml").unlink()
    with pytest.raises(ValueError, match=f"^{finished} holds a run with seed=7, not 42"):
        train(_config(finished, seed=42))
    assert train(_config(finished, seed=7))["seed"] == 7
    assert yaml.safe_load((finished / "config.yaml").read_text())["seed"] == 7
    shutil.rmtree(finished / "checkpoints")
    (finished / "config.yaml").unlink()
    message = f"^{finished} holds 'summary.json', 'metrics.jsonl', 'model' of unknown settings: it has no config.yaml; "
    with pytest.raises(ValueError, match=message):
        train(_config(finished, seed=42))
    summary = train(_config(finished, seed=42, resume="never"))
    assert (summary["seed"], _weights(finished)) == (42, _weights(runs / "42"))


@pytest.mark.parametrize("missing", ["model", "model/model.safetensors", "model/config.json", "cut short", "all"])
def test_a_folder_without_its_model_is_not_finished(runs, finished, missing):
    if missing == "cut short":
        (finished / "model" / "model.safetensors").write_bytes(_weights(finished)[:-1])
    elif missing in ("model", "all"):
        shutil.rmtree(finished / "model")
    else:
        (finished / missing).unlink()
    if missing == "all":
        shutil.rmtree(finished / "checkpoints")
    assert train(_config(finished, seed=7))["seed"] == 7
    assert _weights(finished) == _weights(runs / "7")
    assert (finished / "model" / "config.json").read_bytes() == (runs / "7" / "model" / "config.json").read_bytes()


def test_damaged_checkpoints_of_later_steps_do_not_count(tmp_path, capsys, stop_at, monkeypatch):
    run = tmp_path / "run"
    stop_at(6)
    with pytest.raises(Stopped):
        train(_config(run, checkpoint_steps=1))
    assert _steps(run) == [5, 6]
    for path in list_checkpoints(run / "checkpoints"):
        (path / "model.safetensors").write_bytes(b"")
    stop_at(2)
    with pytest.raises(Stopped):
        train(_config(run, checkpoint_steps=1))
    assert _steps(run) == [1, 2]
    line = f"going on from step 0; 'step-000000005', 'step-000000006' set aside in {run / 'earlier-1'}"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert sorted(path.name for path in (run / "earlier-1" / "checkpoints").iterdir()) == _names(5, 6)
    monkeypatch.undo()
    for name in ("run", "whole"):
        train(_config(tmp_path / name, checkpoint_steps=1))
    assert _weights(run) == _weights(tmp_path / "whole")
    assert [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()] == ["epoch 1/2", "epoch 2/2"] * 2


def _names(*steps):
    return [f"step-{step:09d}" for step in steps]


def test_the_same_command_goes_on_from_what_came_from_its_checkpoint(runs, tmp_path, stop_at, monkeypatch):
    origin = shutil.copytree(list_checkpoints(runs / "7" / "checkpoints")[0], tmp_path / "origin")
    run = tmp_path / "run"
    config = _config(run, seed=7, resume=str(origin), checkpoint_steps=1)
    started = []
    monkeypatch.setattr(LOOP, "train_epoch", _noted(LOOP.train_epoch, started))
    stop_at(2)
    with pytest.raises(Stopped, match="at step 6"):
        train(config)
    assert [read_state(path).origin for path in list_checkpoints(run / "checkpoints")] == [str(origin)] * 2
    shutil.rmtree(origin)  # is not needed any more
    stop_at(1)
    with pytest.raises(Stopped, match="at step 7"):
        train(config)
    stop_at(1000)
    train(_config(run, seed=7, checkpoint_steps=1))
    assert started == [4, 6, 7]
    assert _weights(run) == _weights(runs / "7")
    assert train(config)["seed"] == 7


def _noted(train_epoch, started):
    def noted(run, state, *arguments):
        started.append(run.step(state))
        return train_epoch(run, state, *arguments)

    return noted


def test_back_to_an_earlier_checkpoint_of_its_own(runs, finished, capsys, stop_at):
    first, last = list_checkpoints(finished / "checkpoints")
    (finished / "summary.json").unlink()
    stop_at(1)
    with pytest.raises(Stopped, match="at step 5"):
        train(_config(finished, seed=7, resume=str(first)))
    assert _steps(finished) == [4, 5]
    assert (finished / "earlier-1" / "checkpoints" / last.name / "manifest.json").exists()
    line = f"going on from step 4; 'step-000000008' set aside in {finished / 'earlier-1'}\n"
    assert capsys.readouterr().err == line
    stop_at(1000)
    train(_config(finished, seed=7, resume=str(first)))
    assert _weights(finished) == _weights(runs / "7")


def test_starting_over_sets_the_old_result_aside_whole(runs, finished, capsys, stop_at, monkeypatch):
    assert command(["profile", str(finished), "--data", "digits"]) == 0
    (finished / "timm-sugar").mkdir()
    (finished / "timm-sugar" / "events.out.tfevents.1").touch()
    before = _content(finished)
    assert {"dead_units.png", "activation_profile.png", "profile.json"} <= set(before)
    (finished / "facts.yaml").write_text("license: mit\n")
    capsys.readouterr()
    stop_at(1)
    with pytest.raises(Stopped):
        train(_config(finished, seed=42, resume="never", checkpoint_steps=1))
    assert capsys.readouterr().err == f"the earlier run set aside in {finished / 'earlier-1'}\n"
    assert _content(finished / "earlier-1") == before
    kept = {name.split("/")[0] for name in _content(finished)}
    assert kept == {"earlier-1", "facts.yaml", "config.yaml", "metrics.jsonl", "checkpoints"}
    for argv in (["profile"], ["verify"], ["publish", "--repo-id", "me/x", "--dry-run"]):
        data = [] if argv[0] == "publish" else ["--data", "digits"]
        assert command([argv[0], str(finished), *argv[1:], *data]) == 1
        assert "finished" in capsys.readouterr().err
    evaluated = train(_config(finished, seed=42, eval_only=True))
    assert evaluated["weights"] == str(finished / "checkpoints" / "step-000000001")
    assert train(_config(finished / "earlier-1", seed=7)) == json.loads((runs / "7" / "summary.json").read_text())
    monkeypatch.undo()
    train(_config(finished, seed=42))
    assert _weights(finished) == _weights(runs / "42")


def test_left_over_temporary_files_of_dead_processes_are_removed_by_the_next_start(finished):
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    names = ("config.yaml", "summary.json", "metrics.jsonl", "profile.json", ".writable")
    for name in names:
        for pid in (dead.pid, os.getppid()):
            (finished / f"{name}.{pid}.tmp").touch()
    (finished / f"mine.{dead.pid}.tmp").touch()
    (finished / "config.yaml.backup.tmp").touch()
    train(_config(finished, seed=7))
    expected = {f"{name}.{os.getppid()}.tmp" for name in names} | {f"mine.{dead.pid}.tmp", "config.yaml.backup.tmp"}
    assert {path.name for path in finished.glob("*.tmp")} == expected
    (finished / f"any.json.{dead.pid}.tmp").touch()
    write_file(finished / "any.json", "{}")
    assert not list(finished.glob("any.json.*"))


@pytest.mark.parametrize("content", ["[1]", "null", "3", '"x"', "{", "\udcff"])
@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
def test_files_that_hold_something_else_are_named(finished, name, content):
    (finished / name).write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=rf"^{finished / name} cannot be read: ") as caught:
        train(_config(finished, seed=7))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[1]", "null", "{"])
@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("config.yaml", ["profile", "--data", "digits"]),
        ("config.yaml", ["publish", "--repo-id", "me/x", "--dry-run"]),
        ("summary.json", ["publish", "--repo-id", "me/x", "--dry-run"]),
        ("metrics.jsonl", ["publish", "--repo-id", "me/x", "--dry-run"]),
        ("config.yaml", ["report", "--output", "{folder}/page.html"]),
    ],
)
def test_commands_name_the_file_that_holds_something_else(finished, name, argv, content, capsys):
    (finished / name).write_text(content)
    assert command([argv[0], str(finished), *(part.format(folder=finished) for part in argv[1:])]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"timm-sugar {argv[0]}: error: {finished / name} cannot be read: ")
