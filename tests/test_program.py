"""Programs as processes: Ctrl-C in the imports, and output that nobody reads, that is closed, or on a full device."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
RUN = ["train/digits.py", "--limit-train", "64", "--limit-val", "20", "--img-size", "16", "--epochs", "1"]
RUN += ["--workers", "0", "--model-args", "channels=[8, 8, 8, 8]", "--output"]
MODELS = ["-m", "timm_sugar", "models"]


def _shell(argv, ending, folder):
    """Run a program by bash with its output as `ending` says; return its status, and what stood on standard error."""
    command = f'"$@" {ending}; exit ${{PIPESTATUS[0]}}'
    arguments = ["bash", "-c", command, "bash", sys.executable, *argv]
    done = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT | {"D": str(folder)}, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, and what they start, ignore it


@pytest.mark.parametrize("argv", [MODELS, ["train/digits.py", "--dry-run"], ["-m", "timm_sugar.training", "--dry-run"]])
def test_ctrl_c_while_it_imports_shows_nothing(argv):
    watch = [sys.executable, "-X", "importtime", *argv]  # names each module, on standard error, once it is imported
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_heed_interrupts)
    with subprocess.Popen(watch, cwd=ROOT, env=ENVIRONMENT, **pipes) as process:
        for line in process.stderr:
            if b" torch._" in line:
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130)
    assert (out, [line for line in err.splitlines() if not line.startswith(b"import time:")]) == (b"", [])


@pytest.mark.parametrize(
    ("ending", "line"),
    [
        ("| head -1", ""),
        ("> /dev/full", "No space left on device"),
        ("2> /dev/full", ""),
        (">&- 2>&- <&-", ""),
    ],
)
def test_a_run_outlives_its_output(ending, line, tmp_path):
    status, out, err = _shell([*RUN, str(tmp_path)], ending, tmp_path)
    others = [said for said in err.splitlines() if not said.startswith("epoch 1/1")]
    assert (status, line in err, len(others)) == (0, True, int(bool(line))), err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["epochs"] == 1
    if ending.startswith("2>"):
        assert json.loads(out) == summary


@pytest.mark.parametrize(
    ("ending", "status", "line"),
    [
        ("| true", 0, ""),
        ("> /dev/full", 1, "timm-sugar models: error: the output cannot be written: No space left on device\n"),
        ("2>&-", 0, ""),
    ],
)
def test_a_command_says_that_its_output_cannot_be_written(ending, status, line, tmp_path):
    found, _, err = _shell(MODELS, ending, tmp_path)
    assert (found, err) == (status, line)


@pytest.mark.parametrize("ending", ["2>&-", "2> /dev/full", "2>&1 | true", ">&- 2>&-"])
def test_a_refusal_keeps_its_status(ending, tmp_path):
    assert _shell(["train/digits.py", "--lr", "x"], ending, tmp_path) == (2, "", "")


def test_stopped_without_anywhere_to_say_it_can_go_on(tmp_path):
    argv = [*RUN, str(tmp_path), "--checkpoint-steps", "1"]
    argv[argv.index("--epochs") + 1] = "300"
    with open("/dev/full", "w") as full:
        process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, env=ENVIRONMENT, stdout=full, stderr=full)
    while not any(tmp_path.glob("checkpoints/step-*/manifest.json")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    assert any(tmp_path.glob("checkpoints/step-*/manifest.json"))
