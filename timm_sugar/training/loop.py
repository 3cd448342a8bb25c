"""The training loop: trains a run that is built, from its last checkpoint or from the start."""

import dataclasses
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import normalize, seed_everything
from ..metrics import METRICS, numbers
from .build import Run
from .checkpoints import latest_checkpoint, name_latest, read_checkpoint, write_checkpoint
from .processes import Stopped, StopSignal, average_batch_norm, from_main_process, stop_signals
from .progress import Progress
from .results import finish, measure, refuse_changed_settings, settings_record, write_config, write_metrics
from .schedules import set_surrogate, set_weight_decay, surrogate_at

_CUDA_CHECK_STEPS = 20  # reading a loss waits for the GPU


@dataclass
class State:
    """Where a run is: what a checkpoint holds besides weights and optimizer."""

    epoch: int = 0  # epochs done
    position: int = 0  # steps done in the epoch after those
    loss_sums: list[float] | None = None  # of those steps, one a process
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    best_epoch: int | None = None
    metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


Weights = dict[str, Tensor]


def fit(run: Run) -> dict[str, Any]:
    """Train from the last checkpoint or from the start, write the run's folder and return its summary.

    Raises:
        Stopped: SIGTERM or SIGINT came; the state is saved.
        FloatingPointError: the loss is not finite; the message names step, learning rate and the last good checkpoint.
        OSError: a checkpoint cannot be written; the last good one is in place.
        BadImageError: an image that is decoded as it is needed cannot be.
    """
    config, main = run.config, run.accelerator.is_main_process
    state, best = _resume(run)
    state.settings = settings_record(run)
    write_config(run)
    write_metrics(run, state.metrics)
    done = state.epoch * run.steps_per_epoch + state.position
    if config.tracker != "none":
        run.accelerator.init_trackers("timm-sugar", _loggable(config))
    with (
        stop_signals() as stop,
        Progress(config.epochs * run.steps_per_epoch, done, run.step_images, enabled=main) as progress,
    ):
        try:
            while state.epoch < config.epochs:
                line = train_epoch(run, state, best, progress, stop)
                if run.ema is None:
                    run.evaluated.load_state_dict(run.network.state_dict())
                line |= _validate(run, stop)
                is_best = run.val is None or all(line["val_top1"] > m["val_top1"] for m in state.metrics)
                if is_best:
                    best = {k: v.detach().cpu().clone() for k, v in run.evaluated.state_dict().items()}
                state.seconds += state.epoch_seconds + line.pop("validation_seconds")
                state.epoch += 1
                state.position, state.loss_sums, state.epoch_seconds = 0, None, 0.0
                if is_best and run.val is not None:
                    state.best_epoch = state.epoch
                state.metrics.append(line)
                _save(run, state, best)
                write_metrics(run, state.metrics)
                run.accelerator.log(numbers(line), step=state.epoch)
                progress.epoch(line, config.epochs)
            assert best is not None  # there is an epoch
            summary = finish(run, state, best, partial(_check_stop, run, stop))
        except Stopped as stopped:
            _save(run, state, best)
            raise Stopped(stopped.signum, state.epoch * run.steps_per_epoch + state.position) from None
        finally:
            for tracker in run.accelerator.trackers:
                tracker.finish()
    return summary


def train_steps(run: Run, state: State) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Train the rest of an epoch step by step; yield the mean loss, and logits and labels of the last forward pass.

    Everything random is a function of the seed and of epoch, index, step and rank, and the order of the images one of
    seed, epoch and position, so a run can go on from any step.
    """
    config, accelerator = run.config, run.accelerator
    rank, processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    order = _epoch_order(config.seed, state.epoch, len(run.train))
    parts = []
    for position in range(state.position, run.steps_per_epoch):
        part = order[position * run.step_images : (position + 1) * run.step_images][rank::processes]
        parts += [piece.tolist() for piece in part.split(config.batch_size)]
    batches = run.train.batches(
        parts, config.workers, partial(_seed, config.seed, state.epoch), pin_memory=device.type == "cuda"
    )
    run.model.train()
    total_steps = config.epochs * run.steps_per_epoch
    pass_number = (state.epoch * run.steps_per_epoch + state.position) * config.grad_accum
    loss_sum = torch.zeros((), device=device)
    for inputs, labels in batches:
        step = pass_number // config.grad_accum
        seed_everything(_seed(config.seed, pass_number, rank))  # Mixup, drop path and dropout
        if device.type != "cpu":
            torch.manual_seed(_seed(config.seed, pass_number, rank))
        inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if inputs.dtype == torch.uint8:
            inputs = normalize(inputs, run.data_config["mean"], run.data_config["std"])
        targets = labels
        if run.mixup is not None:
            inputs, targets = run.mixup(inputs, labels)
        if config.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with accelerator.accumulate(run.model):
            logits = run.model(inputs)
            # Mixup smooths its targets itself.
            smoothing = config.smoothing if run.mixup is None else 0.0
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                run.scheduler.step_update(step)
                set_weight_decay(config, run.optimizer, step / total_steps)
                if config.clip_grad is not None:
                    accelerator.clip_grad_norm_(run.model.parameters(), config.clip_grad)
            run.optimizer.step()
            run.optimizer.zero_grad()
        loss_sum += loss.detach() / config.grad_accum
        pass_number += 1
        if pass_number % config.grad_accum == 0:
            average_batch_norm(run.network)
            if run.ema is not None:
                run.ema.update(run.network)
            state.position += 1
            yield loss_sum, logits.detach(), labels
            loss_sum = torch.zeros((), device=device)


def train_epoch(run: Run, state: State, best: Weights | None, progress: Progress, stop: StopSignal) -> dict[str, Any]:
    """Train the rest of an epoch, with the checkpoints that are due, and return its line of metrics, not validated.

    Raises:
        Stopped, FloatingPointError, OSError: as `fit`; a stop is not saved yet.
    """
    config, accelerator = run.config, run.accelerator
    rank, processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    if state.loss_sums is not None:
        loss_sum += state.loss_sums[rank]
    bad_step = torch.full((), -1, dtype=torch.int64, device=device)
    began = saved = time.monotonic()
    earlier = state.epoch_seconds
    surrogate, alpha = surrogate_at(config, state.epoch + 1, run.surrogate)
    set_surrogate(run.network, surrogate, alpha)
    for loss, logits, labels in train_steps(run, state):
        step = state.epoch * run.steps_per_epoch + state.position
        loss_sum += loss
        bad_step = torch.where((bad_step < 0) & ~torch.isfinite(loss), step, bad_step)
        now = time.monotonic()
        state.epoch_seconds = earlier + now - began
        progress.step(loss, logits, labels, mixed=run.mixup is not None)
        due = now - saved > 60 * config.checkpoint_minutes
        due |= config.checkpoint_steps is not None and state.position % config.checkpoint_steps == 0
        last = state.position == run.steps_per_epoch
        read = device.type == "cpu" or step % _CUDA_CHECK_STEPS == 0 or last or due or stop.number
        bad, checkpoint, signum = run.agree(int(bad_step.item()) if read else -1, due, stop.number)
        if signum or (checkpoint and not last):
            (bad,) = run.agree(int(bad_step.item()))
        if bad >= 0:
            _stop_not_finite(run, bad)
        if signum or (checkpoint and not last):
            state.loss_sums = accelerator.gather(loss_sum[None]).tolist()
            if signum:
                raise Stopped(signum)
            _save(run, state, best)
            saved = time.monotonic()
    sums = accelerator.gather(loss_sum[None])
    state.loss_sums = sums.tolist()  # for a stop during validation
    return dict(
        epoch=state.epoch + 1,
        train_loss=sums.sum().item() / (processes * run.steps_per_epoch),
        lr=run.optimizer.param_groups[0]["lr"],
        surrogate=surrogate,
        alpha=alpha,
        images_per_second=run.step_images * run.steps_per_epoch / max(state.epoch_seconds, 1e-9),
        seconds=state.epoch_seconds,
    )


def _stop_not_finite(run: Run, step: int) -> None:
    run.scheduler.step_update(step - 1)  # the rate that this step was made with
    raise FloatingPointError(
        f"the loss is not finite at step {step} (epoch {(step - 1) // run.steps_per_epoch + 1}), "
        f"learning rate {run.optimizer.param_groups[0]['lr']:g}; " + name_latest(run.output / "checkpoints")
    )


def _validate(run: Run, stop: StopSignal) -> dict[str, Any]:
    began = time.monotonic()
    measured = dict.fromkeys(metric.key for metric in METRICS if metric.split == "val")
    if run.val is not None:
        measured |= measure(run, run.val, "val", partial(_check_stop, run, stop))
    return measured | {"validation_seconds": time.monotonic() - began}


def _check_stop(run: Run, stop: StopSignal) -> None:
    (signum,) = run.agree(stop.number)
    if signum:
        raise Stopped(signum)


def _resume(run: Run) -> tuple[State, Weights | None]:
    folder = run.output / "checkpoints"
    if run.config.resume == "never":
        if run.accelerator.is_main_process:
            for name in ("summary.json", "metrics.jsonl"):
                (run.output / name).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
        return State(), None
    checkpoint = None
    if run.accelerator.is_main_process:  # the others may be on machines that do not see the folder
        path = latest_checkpoint(folder) if run.config.resume == "auto" else Path(run.config.resume)
        checkpoint = None if path is None else read_checkpoint(path)
    checkpoint = from_main_process(checkpoint)
    if checkpoint is None:
        return State(), None
    state = State(**checkpoint["progress"])
    refuse_changed_settings(run.config.resume, state.settings, settings_record(run))
    run.network.load_state_dict(checkpoint["weights"])
    extra = checkpoint["optimizer"]
    run.optimizer.load_state_dict(extra["optimizer"])
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(extra["scaler"])
    if run.ema is not None:
        run.ema.module.load_state_dict(extra["ema"])
    return state, checkpoint["best"]


def _save(run: Run, state: State, best: Weights | None) -> None:
    if run.accelerator.is_main_process:
        scaler = run.accelerator.scaler
        extra = {
            "optimizer": run.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ema": run.ema.module.state_dict() if run.ema is not None else None,
        }
        step = state.epoch * run.steps_per_epoch + state.position
        folder = run.output / "checkpoints"
        write_checkpoint(folder, step, run.network.state_dict(), best, extra, dataclasses.asdict(state))
    run.accelerator.wait_for_everyone()


def _loggable(config: Any) -> dict[str, Any]:
    settings = dataclasses.asdict(config)
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in settings.items()}


def _seed(*parts: int) -> int:
    """Mix several numbers into one seed of 63 bits; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """Return the order in which an epoch goes through the training images, a permutation of range(count)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(_seed(seed, epoch)))
