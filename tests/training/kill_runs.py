"""Helper of test_resume.py: trains a small run to its end, then again and again with SIGKILL at random instants.

Every start is a process of its own, forked from this one after the imports, so that it starts in no time.

    python tests/training/kill_runs.py FOLDER PROCESSES KILLS

Prints the number of kills, and of finished runs that were compared with the uninterrupted one, as JSON.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import sklearn.datasets  # noqa: F401  # imported here, for all starts at once
import torch

from timm_sugar import sugar
from timm_sugar.training import TrainConfig, train

# All that is random in training: augmentation, Mixup, drop path; and all the state: momenta, moving average, BatchNorm.
SETTINGS = dict(
    data="digits", limit_train=160, limit_val=40, img_size=16, batch_size=16, grad_accum=2, epochs=3,
    model_args=dict(channels=[8, 8, 8, 8], drop_path_rate=0.2), opt="adamw", lr=0.002, weight_decay=0.05,
    weight_decay_end=0.01, sched="cosine", warmup_epochs=0.5, clip_grad=5.0, ema_decay=0.9, smoothing=0.1,
    crop="padded", hflip=0.5, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, mixup=0.8, cutmix=1.0,
    alpha_schedule="linear", alpha_end=1.0, switch_epoch=3, switch_surrogate="nelu", checkpoint_steps=1,
)  # fmt: skip
STEPS = 15  # in 3 epochs of 160 images


def start(output: Path, processes: int, workers: int) -> list[int]:
    """Fork the processes of one start of the run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                if processes > 1:
                    os.environ.update(
                        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                        LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                    )  # fmt: skip
                train(TrainConfig(**SETTINGS, output=str(output), workers=workers))
                status = 0
            except BaseException:
                # A process whose partner was killed sees its connection break.
                (output / f"failure-{rank}.txt").write_text(traceback.format_exc())
            finally:
                os._exit(status)
        pids.append(pid)
    return pids


def wait(pids: list[int]) -> list[int]:
    """Wait for processes and return their exit statuses, negative for a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def outcome(output: Path) -> tuple[str, list[dict]]:
    """Return the hash of the final weights, and the metrics without times."""
    digest = hashlib.sha256((output / "model" / "model.safetensors").read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return digest, [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


def newest(output: Path) -> str:
    """Return the name of the newest checkpoint, "" where there is none."""
    sealed = (output / "checkpoints").glob("step-?????????/manifest.json")
    return max((path.parent.name for path in sealed), default="")


def ended(output: Path) -> bool:
    """Whether the run is finished, or a process of it has failed by itself."""
    return (output / "summary.json").exists() or any(output.glob("failure-*.txt"))


def main() -> None:
    folder, processes, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    for surrogate in ("bsilu", "nelu"):  # compiles the kernels that every start would compile again
        sugar(torch.ones(8, requires_grad=True), surrogate).sum().backward()
    began = time.monotonic()
    whole = folder / "whole"
    whole.mkdir()
    if any(wait(start(whole, processes, workers=0))):
        sys.exit("".join(path.read_text() for path in whole.glob("failure-*.txt")))
    duration = time.monotonic() - began
    expected = outcome(whole)

    instants = random.Random(0)
    killed = finished = resumed = 0
    output = folder / "killed"
    output.mkdir()
    while killed < kills or not finished:
        before = newest(output)
        pids = start(output, processes, workers=killed % 2)
        # Most starts are killed after a checkpoint more, at whatever instant, so that the run gets on however slow the
        # machine is; some at once, in the start itself or the first step.
        at_once = instants.random() < 0.3
        delay = instants.uniform(0, duration / 4 if at_once else duration / STEPS)
        last = killed == kills  # ends in peace
        while not ended(output) and (last or not (at_once or newest(output) > before)):
            time.sleep(0.002)
        if not last:
            time.sleep(delay)
        if not ended(output):
            first = instants.randrange(processes)
            for pid in pids[first:] + pids[:first]:
                os.kill(pid, signal.SIGKILL)
            wait(pids)
            killed += 1
            resumed += newest(output) != ""
            for failure in output.glob("failure-*.txt"):  # of a process whose partner was killed
                failure.unlink()
            continue
        if any(wait(pids)):
            sys.exit("".join(path.read_text() for path in output.glob("failure-*.txt")))
        if outcome(output) != expected:
            sys.exit(f"after {killed} kills: {outcome(output)} is not {expected}")
        finished += 1
        shutil.rmtree(output)
        output.mkdir()
    print(json.dumps(dict(killed=killed, finished=finished, resumed=resumed, seconds=time.monotonic() - began)))


if __name__ == "__main__":
    main()
