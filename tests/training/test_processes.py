"""Two processes: the same result as one where the mathematics is the same, every image evaluated once, one folder."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.two_processes import run_all, share_evaluation

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def folders(parquet_folder, tmp_path_factory):
    """The same runs by one process, here, and by two that torchrun starts."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    command = [*TORCHRUN, "tests/training/two_processes.py", str(two), parquet_folder]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    run_all(one, parquet_folder, 1)
    share_evaluation(one)
    return one, two


def _lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_transformer_has_the_same_loss_curve(folders):
    ours, theirs = (_lines(folder / "transformer") for folder in folders)
    assert len(ours) == 2
    for a, b in zip(ours, theirs, strict=True):
        for name in ("train_loss", "val_loss"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
        for name in ("lr", "val_top1", "dead_units"):
            assert a[name] == b[name], name
    weights = [load_file(folder / "transformer/model/model.safetensors") for folder in folders]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-2, atol=1e-3)


def test_batch_norm_statistics_are_those_of_both_processes(folders):
    # At learning rate 0. The means of a batch's halves average to the batch's, their variances do not.
    one, two = (load_file(folder / "batch_norm/model/model.safetensors") for folder in folders)
    torch.testing.assert_close(one["bn1.running_mean"], two["bn1.running_mean"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one["bn1.running_var"], two["bn1.running_var"], rtol=0.2, atol=0.0)
    assert not torch.allclose(one["bn1.running_var"], two["bn1.running_var"], rtol=1e-6)
    summaries = [json.loads((folder / "batch_norm/summary.json").read_text()) for folder in folders]
    assert [summary["processes"] for summary in summaries] == [1, 2]
    assert [summary["test_images"] for summary in summaries] == [60, 60]


def test_every_image_is_evaluated_once(folders):
    one, two = (json.loads((folder / "evaluation.json").read_text()) for folder in folders)
    for count in ("5", "1"):
        assert one[count] == pytest.approx(two[count], rel=1e-6)
        assert two[count][2] == sum(two[count][10:26]) == int(count)


def _digits(folder, *flags):
    flags = ("--limit-train", "64", "--limit-val", "21", "--img-size", "16", "--mixed-precision", "no", *flags)
    small = ("--model-args", "channels=[8, 8, 8, 8]", "--batch-size", "16", "--epochs", "400")
    return ["train/digits.py", *small, "--output", str(folder), *flags]


@pytest.mark.slow
def test_two_machines_over_loopback_stop_and_accelerate_launch_starts_two(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    node = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    node += ["--master_addr", "127.0.0.1", "--master_port", str(port), "--node_rank"]
    both = [
        subprocess.Popen(
            [*node, str(rank), *_digits(tmp_path)], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()) and all(process.poll() is None for process in both):
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)  # one machine is asked to stop, and both do, at the same step
    shown = [process.communicate(timeout=900)[1] for process in both]
    (line,) = (line for line in shown[0].splitlines() if line.startswith("digits.py: stopped by SIGTERM"))
    step = int(re.search(r"at step (\d+);", line)[1])
    assert (tmp_path / "checkpoints" / f"step-{step:09d}" / "manifest.json").exists()

    command = [*LAUNCH, *_digits(tmp_path, "--dry-run")]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps_per_epoch"] == 64 // (2 * 16)
