"""Exact resume: killed at random instants, stopped by signals, refused where a setting changed, a disk that fails."""

import ctypes
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml

from timm_sugar.training import Stopped, TrainConfig, main, train
from timm_sugar.training.checkpoint import latest_checkpoint, list_checkpoints
from timm_sugar.training.processes import folder_lock
from timm_sugar.training.progress import Progress

ROOT = Path(__file__).parents[2]
LOOP = sys.modules["timm_sugar.training.train"]  # the function has the same name
SMALL = {"channels": [8, 8, 8, 8]}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _config(output, **settings):
    defaults = dict(limit_train=64, limit_val=20, img_size=16, batch_size=16, epochs=1, model_args=SMALL)
    return TrainConfig(data="digits", output=str(output), **defaults | settings)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, 12), (2, 4)])
def test_killed_at_random_instants_it_ends_with_the_same_bits(processes, kills, tmp_path):
    command = [sys.executable, "-W", "error", "tests/training/kill_runs.py", tmp_path, str(processes), str(kills)]
    # Into files: a pipe would be waited for as long as any process that a kill orphaned holds it.
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=err, env=ENVIRONMENT, timeout=900)
    assert done.returncode == 0, (tmp_path / "err").read_text()
    counts = json.loads((tmp_path / "out").read_text())
    assert counts["killed"] == kills
    assert counts["finished"] >= 1
    assert counts["resumed"] >= 1


def test_sigterm_saves_and_names_the_command(tmp_path):
    command = [sys.executable, "train/digits.py", "--epochs", "500", "--img-size", "16", "--output", str(tmp_path)]
    command += ["--resume", "never", "--workers", "1", "--hflip", "0.1", "--model-args", "channels=[8, 8, 8, 8]"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=900)
    assert process.returncode == 143, shown
    (line,) = (line for line in shown.splitlines() if line.startswith("digits.py"))  # beside the compiler's own
    assert line.startswith("digits.py: stopped by SIGTERM at step ")
    flags = f"--output {tmp_path} --workers 1 --hflip 0.1 --model-args 'channels=[8, 8, 8, 8]'"
    assert line.endswith(f"train/digits.py --epochs 500 --img-size 16 {flags}")
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert line.split(" at step ")[1].split(";")[0] == str(int(checkpoint.name.removeprefix("step-")))


def test_ctrl_c_saves_after_the_step_under_way(tmp_path, monkeypatch, capsys):
    def interrupt(self, *arguments, **more):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Progress, "step", interrupt)
    flags = ["--limit-train", "64", "--limit-val", "20", "--img-size", "16", "--model-args", "channels=[8, 8, 8, 8]"]
    monkeypatch.setattr(sys, "argv", ["train/digits.py", "--output", str(tmp_path), *flags])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        main(str(ROOT / "train/digits.py"), "text", "digits")
    assert stopped.value.code == 130
    assert capsys.readouterr().err.startswith("digits.py: stopped by SIGINT at step 1; saved; resume with: ")
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step-000000001"
    assert signal.getsignal(signal.SIGINT) is before


def test_the_demo_stops_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Progress, "step", lambda self, *arguments, **more: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train/demo.py"), "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "train/demo.py"), run_name="__main__")
    assert stopped.value.code == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("demo.py: stopped by SIGINT at step 1; saved; resume with: ")
    assert line.endswith(f"train/demo.py --output {tmp_path}")


@pytest.mark.parametrize("channels_last", [False, True])
def test_stopped_during_validation_it_goes_on_from_there(channels_last, tmp_path, monkeypatch):

    def stop(*args):
        raise Stopped(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(LOOP, "evaluate_split", stop)
        with pytest.raises(Stopped, match="stopped by SIGTERM at step 4"):
            train(_config(tmp_path / "stopped", epochs=2, channels_last=channels_last))
    assert latest_checkpoint(tmp_path / "stopped" / "checkpoints").name == "step-000000004"
    for name in ("stopped", "whole"):
        train(_config(tmp_path / name, epochs=2, channels_last=channels_last))
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("stopped", "whole")]
    assert weights[0] == weights[1]
    assert len((tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()) == 2


def test_resuming_from_a_checkpoint_with_a_changed_setting_is_refused(tmp_path):
    train(_config(tmp_path / "a", epochs=2))
    checkpoint = list_checkpoints(tmp_path / "a" / "checkpoints")[0]
    with pytest.raises(ValueError, match=r"holds a run with lr=0\.001, not 0\.5"):
        train(_config(tmp_path / "b", epochs=2, lr=0.5, resume=str(checkpoint)))
    again = train(_config(tmp_path / "b", epochs=2, resume=str(checkpoint)))
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert again["epochs"] == 2


def test_a_setting_left_open_may_not_change_either(tmp_path):
    train(_config(tmp_path, mean=[0.5, 0.5, 0.5]))
    with pytest.raises(ValueError, match=r"holds a run with mean=\[0.5, 0.5, 0.5\], not None"):
        train(_config(tmp_path))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"processes": 2}))
    with pytest.raises(ValueError, match="holds a run with processes=2, not 1"):
        train(_config(tmp_path, mean=[0.5, 0.5, 0.5]))


def test_a_run_waits_for_the_process_that_still_trains_in_its_folder(tmp_path, capsys):
    holder = (
        "import fcntl, sys, time\n"
        "file = open(sys.argv[1], 'w')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "time.sleep(0.5)\n"
        "open(sys.argv[1] + '.released', 'w')\n"
    )
    command = [sys.executable, "-c", holder, tmp_path / ".lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with folder_lock(tmp_path):
            assert (tmp_path / ".lock.released").exists()
    assert capsys.readouterr().err == f"waiting for another process that trains in {tmp_path}\n"
    assert not (tmp_path / ".lock").exists()


@contextmanager
def _full_disk(folder):
    """The kernel refuses to write more than a page into a file."""
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@contextmanager
def _read_only(folder):
    """The permission to write is taken away; root gives up the capability by which it needs none."""
    header, capabilities = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc, overriding = ctypes.CDLL(None), 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capget(header, capabilities) == 0
    effective = capabilities[0]
    capabilities[0] &= ~overriding
    assert libc.capset(header, capabilities) == 0
    folder.chmod(0o500)
    try:
        yield
    finally:
        folder.chmod(0o700)
        capabilities[0] = effective
        assert libc.capset(header, capabilities) == 0


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (_full_disk, ""),
        pytest.param(
            _read_only, "Permission denied", marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux")
        ),
    ],
)
def test_a_folder_that_fails_in_mid_run_keeps_the_last_good_checkpoint(trouble, reason, tmp_path, monkeypatch):

    write, troubles = LOOP.write_checkpoint, ExitStack()

    def write_then_fail(folder, *arguments):
        path = write(folder, *arguments)
        troubles.enter_context(trouble(folder))
        return path

    monkeypatch.setattr(LOOP, "write_checkpoint", write_then_fail)
    message = rf"step-000000002 cannot be written: .*{reason}.*; the last good checkpoint is .*step-000000001$"
    with troubles, pytest.raises(OSError, match=message) as caught:
        train(_config(tmp_path, checkpoint_steps=1))
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000001"]
    monkeypatch.undo()
    assert train(_config(tmp_path))["epochs"] == 1


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError) as caught:
        train(_config(tmp_path, lr=1e30, sched="constant", checkpoint_steps=1))
    message = str(caught.value)
    assert "the loss is not finite at step 2 (epoch 1), learning rate 1e+30; the last good checkpoint is" in message
    assert message.endswith("step-000000001")
    with pytest.raises(FloatingPointError, match="; there is no checkpoint yet"):
        train(_config(tmp_path / "none", lr=1e30, sched="constant"))
