"""Processes of a run: process group, collective decisions, signals, the lock on the folder."""

import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, parse_flag_from_env

from ..settings import TrainConfig

T = TypeVar("T")


def on_cpu() -> bool:
    """Whether to train on the CPU: on request, or without an accelerator. accelerate uses gloo only with cpu=True."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def process_state() -> PartialState:
    """Return accelerate's state of this process; the first call joins the process group."""
    return PartialState(cpu=on_cpu())


class Stopped(Exception):
    """A signal stopped the run after its state was saved."""

    def __init__(self, signum: int, step: int | None = None):
        super().__init__(f"stopped by {signal.Signals(signum).name}" + ("" if step is None else f" at step {step}"))
        self.signum, self.step = signum, step


@dataclass
class StopSignal:
    """The signal received by this process, 0 for none."""

    number: int = 0


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Record SIGTERM and SIGINT (Ctrl-C) instead of exiting; a second signal has its usual effect."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        stop.number = number
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock the folder of a run; wait while another process on this machine holds the lock.

    After a launcher was killed, its training processes may still run when the same command is started again.
    """
    import fcntl  # Unix only

    if not process_state().is_main_process:
        yield
        return
    path = folder / ".lock"
    while True:
        with path.open("w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by loader workers
            except BlockingIOError:
                print(f"waiting for another process that trains in {folder}", file=sys.stderr)
                fcntl.lockf(file, fcntl.LOCK_EX)
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                continue  # the previous holder removed the file
            try:
                yield
            finally:
                with suppress(OSError):  # a read-only folder is reported elsewhere
                    path.unlink()
            return


class AllReduceMax:
    """All-reduce of host integers with MAX over the processes, for decisions that all take at the same step."""

    def __init__(self) -> None:
        self._group: Any = None
        if dist.is_initialized() and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")  # does not synchronise with the GPU

    def __call__(self, *values: int) -> list[int]:
        if not dist.is_initialized():
            return list(values)
        shared = torch.tensor(values)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
        return shared.tolist()


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return the accelerator of a run, or raise if this machine does not support a setting."""
    # accelerate keeps the precision of an earlier run in this process.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    if config.tracker not in ("none", *map(str, get_available_trackers())):
        raise ModuleNotFoundError(f"tracker {config.tracker} is not installed: pip install {config.tracker}")
    try:
        accelerator = Accelerator(
            cpu=on_cpu(),
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.grad_accum,
            log_with=None if config.tracker == "none" else config.tracker,
            project_dir=config.output,
            # average_batch_norm synchronises the buffers after each step.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as error:
        raise ValueError(f"mixed_precision {config.mixed_precision} does not work here: {error}") from error
    if config.sync_bn and accelerator.device.type != "cuda":
        raise ValueError(f"sync_bn needs GPUs: SyncBatchNorm does not work on {accelerator.device.type}")
    emulated = accelerator.device.type == "cpu" and not has_instructions(config.mixed_precision)
    if emulated and accelerator.is_main_process:
        warnings.warn(
            f"this CPU has no instructions for {config.mixed_precision}: --mixed-precision no is several times faster",
            stacklevel=2,
        )
    return accelerator


def has_instructions(precision: str) -> bool:
    """Whether this CPU supports this precision in oneDNN natively instead of by emulation."""
    if precision == "no" or not torch.backends.mkldnn.is_available():
        return True
    supported = dict(bf16=torch.ops.mkldnn._is_mkldnn_bf16_supported, fp16=torch.ops.mkldnn._is_mkldnn_fp16_supported)
    return bool(supported[precision]())


def from_main_process(compute: Callable[..., T], *arguments: Any) -> T:
    """Call a function in the main process; return its result, or raise its ValueError, in every process."""
    found: tuple[T | None, ValueError | None] = None, None
    if process_state().is_main_process:
        try:
            found = compute(*arguments), None
        except ValueError as error:
            found = None, error
    value: T
    value, problem = broadcast_object_list([found])[0]
    if problem is not None:
        raise problem
    return value


def resume_command() -> str:
    """Return the command line that resumes this run."""
    arguments = list(sys.argv)
    if Path(arguments[0]).name == "__main__.py":  # started as a module
        arguments[:1] = ["-m", __package__]
    environment = os.environ
    if "ACCELERATE_MIXED_PRECISION" in environment:
        launcher = ["accelerate", "launch"]
    elif int(environment.get("WORLD_SIZE", 1)) > 1:
        launcher = ["torchrun", "--nproc_per_node", environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"])]
        if environment.get("GROUP_WORLD_SIZE", "1") != "1":
            launcher += ["--nnodes", environment["GROUP_WORLD_SIZE"], "..."]
    else:
        launcher = [os.path.basename(sys.executable)]
    return re.sub(" --resume[ =]never(?= |$)", "", shlex.join([*launcher, *arguments]))
