"""The training loop: build, resume, epochs, finish."""

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..data import seed_everything
from ..layers import Activation
from ..metrics import METRICS
from ..settings import TrainConfig
from .batches import training_batches
from .checkpoint import Checkpoint, State, Weights, name_latest, write_checkpoint
from .device import HostCopy, place_images, use_fused_steps
from .evaluation import evaluate_split
from .first_step import check_first_step, path_of
from .folder import peak_memory, start_or_resume, summarize, write_metrics, write_record, write_result
from .images import Images, epoch_order, load_images, make_mixup, mix_seeds, open_source
from .network import average_batch_norm, build_network, check_names, create_optimizer
from .passes import Passes, graph_of
from .pretrained import Initial, find_initial, freeze, start_from
from .processes import AllReduceMax, Stopped, StopSignal, make_accelerator, stop_signals
from .progress import Progress
from .schedules import activation_at, check_activation, create_lr_schedule, set_activation, set_weight_decay
from .tracking import Tracking, learning_rate


@dataclass(frozen=True)
class Run:
    """Everything built before the first step."""

    config: TrainConfig  # with open settings (mean, std, warmup_epochs) resolved
    left_open: list[str]  # names of the settings that were open
    accelerator: Accelerator
    all_reduce_max: AllReduceMax
    images: Images
    step_images: int  # images per optimizer step, over all processes
    steps_per_epoch: int  # full steps; the remaining images, others in each epoch, are skipped
    network: nn.Module  # with the trained weights
    model: nn.Module  # the same network as wrapped by torch.compile and accelerate
    evaluated: nn.Module  # a second network, in float32, for evaluation and packaging; the moving average, if any
    ema: ModelEmaV3 | None
    mixup: Mixup | None
    passes: Passes  # forward and backward of `model`
    optimizer: Any
    scheduler: Any
    activation: Activation  # surrogate and alpha as built
    initial: Initial | None  # initial weights; None for random ones

    @property
    def settings(self) -> dict[str, Any]:
        """The record of the run: resolved settings, names of open ones, data fingerprint, number of processes."""
        record = dataclasses.asdict(self.config) | {"data_fingerprint": self.images.fingerprint}
        record["gradients"] = path_of(self.config, self.network, self.accelerator.device)
        if self.initial is not None:
            record["weights"] = self.initial.record
        return record | {"left_open": self.left_open, "processes": self.accelerator.num_processes}

    @property
    def stateful(self) -> dict[str, Any]:
        """Objects with a state besides the weights, by their names in a checkpoint; None for absent ones."""
        ema = None if self.ema is None else self.ema.module
        return {"optimizer": self.optimizer, "scaler": self.accelerator.scaler, "ema": ema}

    def step(self, state: State) -> int:
        """Return the number of optimizer steps done."""
        return state.epoch * self.steps_per_epoch + state.position


def build(config: TrainConfig) -> Run:
    """Build everything that training needs; raise an exception with a one-line message if something is invalid."""
    check_names(config)
    accelerator = make_accelerator(config)
    processes, device = accelerator.num_processes, accelerator.device
    given = vars(config)
    config, initial = find_initial(config)
    source = open_source(config, warn=accelerator.is_main_process)
    # Built before the images are decoded, so that a wrong argument fails at once.
    network, evaluated = (build_network(config, source, initial) for _ in range(2))
    start_from(initial, network, config, source.class_names)
    activation = check_activation(config, network)
    images = load_images(config, source, accelerator.process_index, processes)
    warmup = 0.1 * config.epochs * (config.sched == "cosine") if config.warmup_epochs is None else config.warmup_epochs
    mean, std = list(images.data_config["mean"]), list(images.data_config["std"])
    config = dataclasses.replace(config, mean=mean, std=std, warmup_epochs=warmup)
    left_open = [name for name, value in vars(config).items() if value is not None and given[name] is None]
    network, evaluated = network.to(device), evaluated.to(device)
    ema = None if config.ema_decay is None else ModelEmaV3(network, decay=config.ema_decay)
    evaluated = evaluated if ema is None else ema.module
    evaluated.eval().requires_grad_(False)
    if config.sync_bn:
        network = convert_sync_batchnorm(network)
        freeze(network, config.freeze)  # again, since BatchNorm modules were replaced
    if config.channels_last:
        network = network.to(memory_format=torch.channels_last)
    count = images.sizes["train"]
    step_images = min(config.batch_size * config.grad_accum * processes, count // processes * processes)
    lr_scale = 1.0 if config.lr_base_batch is None else step_images / config.lr_base_batch
    optimizer: Any = create_optimizer(config, network, lr_scale)
    use_fused_steps(optimizer, device)
    model = torch.compile(network) if config.compile else network
    with warnings.catch_warnings():  # newer versions of torch rename broadcast_buffers
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        model, optimizer = accelerator.prepare(model, optimizer)
    scheduler = create_lr_schedule(config, optimizer, count // step_images, lr_scale)
    mixup = make_mixup(config, len(images.class_names))
    passes = Passes(config, network, model, accelerator, graph_of(config, accelerator), count // step_images)
    place_images(images, device)
    return Run(
        config=config, left_open=left_open, accelerator=accelerator, all_reduce_max=AllReduceMax(), images=images,
        step_images=step_images, steps_per_epoch=count // step_images, network=network, model=model,
        evaluated=evaluated, ema=ema, mixup=mixup, passes=passes, optimizer=optimizer, scheduler=scheduler,
        activation=activation, initial=initial,
    )  # fmt: skip


def fit(run: Run) -> dict[str, Any]:
    """Train from the last checkpoint or from scratch, write the run's folder and return its summary.

    Raises:
        Stopped: SIGTERM or SIGINT was received; the state is saved.
        FloatingPointError: the loss is not finite; the message names step, learning rate and the last good checkpoint.
        OSError: a checkpoint cannot be written; the last good one is kept.
        BadImageError: an image that is decoded on the fly cannot be decoded.
    """
    config, main = run.config, run.accelerator.is_main_process
    state, best = resume(run)
    state.settings = run.settings
    total, warm_up = config.epochs * run.steps_per_epoch, run.passes.warm_up
    with Progress(total, run.step(state), run.step_images, main, warm_up) as progress, ExitStack() as stack:
        check_first_step(config, run.model, run.images, run.accelerator, run.all_reduce_max)
        if main:
            write_record(config.folder, run.settings)
            write_metrics(config.folder, state.metrics)
        tracking = Tracking(run.accelerator, config.tracker, run.settings)
        stop = stack.enter_context(stop_signals())

        def check_stop() -> None:
            if signum := run.all_reduce_max(stop.number)[0]:
                raise Stopped(signum)

        evaluate = partial(evaluate_split, run.evaluated, run.images, run.accelerator, config.workers, check_stop)
        try:
            while state.epoch < config.epochs and not state.stops_early(config.patience):
                line = train_epoch(run, state, best, progress, tracking, stop)
                if run.ema is None:
                    run.evaluated.load_state_dict(run.network.state_dict())
                began = time.monotonic()
                line |= dict.fromkeys(metric.key for metric in METRICS if metric.split == "val")
                if run.images.val is not None:
                    line |= evaluate("val")
                is_best = run.images.val is None or all(line["val_top1"] > m["val_top1"] for m in state.metrics)
                if is_best:
                    best = {k: v.detach().cpu().clone() for k, v in run.evaluated.state_dict().items()}
                line["seconds"] = state.epoch_seconds + time.monotonic() - began
                state.seconds += line["seconds"]
                state.epoch += 1
                state.position, state.loss_sums, state.unit_counts, state.epoch_seconds = 0, None, None, 0.0
                if is_best and run.images.val is not None:
                    state.best_epoch = state.epoch
                state.metrics.append(line)
                _save(run, state, best)
                if main:
                    write_metrics(config.folder, state.metrics)
                tracking.epoch(line, run.step(state))
                progress.epoch(line, config.epochs)
            if state.epoch < config.epochs:
                progress.note(f"stopped early: no better validation accuracy since epoch {state.best_epoch}")
            assert best is not None  # there is at least one epoch
            return finish(run, state, best, evaluate)
        except Stopped as stopped:
            tracking.flush()
            _save(run, state, best)
            raise Stopped(stopped.signum, run.step(state)) from None
        finally:
            tracking.finish()
            run.passes.units.detach()


def resume(run: Run) -> tuple[State, Weights | None]:
    """Restore the checkpoint to resume from; return the progress and the weights of the best epoch so far."""
    checkpoint = start_or_resume(run.config, run.settings, run.step)
    if checkpoint is None:
        return State(), None
    run.network.load_state_dict(checkpoint.weights)
    for name, part in run.stateful.items():
        if part is not None:
            part.load_state_dict(checkpoint.optimizer[name])
    return checkpoint.state, checkpoint.best


def _save(run: Run, state: State, best: Weights | None) -> None:
    if run.accelerator.is_main_process:
        states = {name: None if part is None else part.state_dict() for name, part in run.stateful.items()}
        checkpoint = Checkpoint(run.network.state_dict(), best, states, state)
        write_checkpoint(run.config.folder / "checkpoints", run.step(state), checkpoint)
    run.accelerator.wait_for_everyone()


def train_epoch(
    run: Run, state: State, best: Weights | None, progress: Progress, tracking: Tracking, stop: StopSignal
) -> dict[str, Any]:
    """Train the rest of an epoch and write checkpoints when due; return the training metrics, or raise as `fit`."""
    config, accelerator, device = run.config, run.accelerator, run.accelerator.device
    so_far = state.loss_sums[accelerator.process_index] if state.loss_sums else 0.0
    loss_sum = torch.tensor(so_far, dtype=torch.float64, device=device)
    bad_step = torch.full((), -1, dtype=torch.int64, device=device)
    seen = HostCopy(bad_step)
    began = saved = time.monotonic()
    earlier = state.epoch_seconds
    activation = activation_at(config, state.epoch + 1, run.activation)
    run.passes.begin_epoch(activation, state.position, state.unit_counts)
    for loss, logits, labels in train_steps(run, state):
        step = run.step(state)
        loss_sum += loss
        tracking.step(step, loss, run.optimizer)
        bad_step = torch.where((bad_step < 0) & ~torch.isfinite(loss), step, bad_step)
        state.epoch_seconds = earlier + time.monotonic() - began
        progress.step(loss, logits, labels, mixed=run.mixup is not None)
        due = time.monotonic() - saved > 60 * config.checkpoint_minutes
        due |= config.checkpoint_steps is not None and state.position % config.checkpoint_steps == 0
        last = state.position == run.steps_per_epoch
        seen.update(bad_step)
        bad, checkpoint, signum = run.all_reduce_max(seen.read(), due, stop.number)
        if signum or checkpoint or last:  # synchronise before saving or ending
            (bad,) = run.all_reduce_max(int(bad_step.item()))
            state.epoch_seconds = earlier + time.monotonic() - began
        if bad >= 0:
            tracking.flush()
            run.scheduler.step_update(bad - 1)  # restore the learning rate of that step
            raise FloatingPointError(
                f"the loss is not finite at step {bad} (epoch {(bad - 1) // run.steps_per_epoch + 1}), learning rate "
                f"{learning_rate(run.optimizer):g}; {name_latest(run.config.folder / 'checkpoints')}"
            )
        if signum or (checkpoint and not last):
            state.loss_sums, state.unit_counts = accelerator.gather(loss_sum[None]).tolist(), run.passes.units.counts()
            if signum:
                raise Stopped(signum)
            _save(run, state, best)
            saved = time.monotonic()
    sums = accelerator.gather(loss_sum[None])
    state.loss_sums, state.unit_counts = sums.tolist(), run.passes.units.counts()  # for a stop during validation
    return dict(
        epoch=state.epoch + 1,
        train_loss=sums.sum().item() / (accelerator.num_processes * run.steps_per_epoch),
        lr=learning_rate(run.optimizer),
        train_dead_units=run.passes.units.dead(state.unit_counts),
        surrogate=activation.surrogate,
        alpha=activation.alpha,
        images_per_second=run.step_images * run.steps_per_epoch / max(state.epoch_seconds, 1e-9),
    )


def train_steps(run: Run, state: State) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Train the rest of an epoch step by step; yield the mean loss, and logits and labels of the last forward pass.

    Randomness depends only on the seed, epoch, image index, step and rank, and the order of the images only on the
    seed and epoch, so a run can resume from any step.
    """
    config, accelerator = run.config, run.accelerator
    rank, processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    order = epoch_order(config.seed, state.epoch, len(run.images.train))
    parts: list[Tensor] = []
    for position in range(state.position, run.steps_per_epoch):
        part = order[position * run.step_images : (position + 1) * run.step_images][rank::processes]
        parts += part.split(config.batch_size)
    run.model.train()
    total_steps = config.epochs * run.steps_per_epoch
    pass_number = run.step(state) * config.grad_accum
    loss_sum = torch.zeros((), device=device)
    for inputs, labels in training_batches(config, run.images, device, state.epoch, parts):
        step = pass_number // config.grad_accum
        seed = mix_seeds(config.seed, pass_number, rank)
        seed_everything(seed)  # for Mixup, drop path and dropout
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)
        targets = labels
        if run.mixup is not None:
            inputs, targets = run.mixup(inputs, labels)
        with accelerator.accumulate(run.model):
            loss, logits = run.passes(inputs, targets, first=pass_number % config.grad_accum == 0)
            if accelerator.sync_gradients:
                run.scheduler.step_update(step)
                set_weight_decay(config, run.optimizer, step / total_steps)
                if config.clip_grad is not None:
                    accelerator.clip_grad_norm_(run.model.parameters(), config.clip_grad)
            run.optimizer.step()
        loss_sum += loss / config.grad_accum
        pass_number += 1
        if pass_number % config.grad_accum == 0:
            average_batch_norm(run.network)
            if run.ema is not None:
                run.ema.update(run.network)
            state.position += 1
            yield loss_sum, logits, labels
            loss_sum = torch.zeros((), device=device)


def finish(run: Run, state: State, best: Weights, evaluate: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Evaluate the best epoch on the test set, package it and write the summary."""
    config, images = run.config, run.images
    run.evaluated.load_state_dict(best)
    line = state.metrics[(state.best_epoch or len(state.metrics)) - 1]
    set_activation(run.evaluated, Activation(line["surrogate"], line["alpha"]))
    began = time.monotonic()
    test = evaluate("test")
    found = {**line, **test} if images.val is None else {**test, **line}
    summary = summarize(
        config, run.evaluated, images,
        pretrained=run.initial and run.initial.source, surrogate=line["surrogate"], alpha=line["alpha"],
        trained_parameters=sum(p.numel() for p in run.network.parameters() if p.requires_grad),
        processes=run.accelerator.num_processes, trained_epochs=state.epoch, best_epoch=state.best_epoch,
        **{metric.key: found[metric.key] for metric in METRICS if metric.split != "train"},
        images_per_second=float(np.median([line["images_per_second"] for line in state.metrics])),
        peak_memory_bytes=peak_memory(run.accelerator.device), seconds=state.seconds + time.monotonic() - began,
    )  # fmt: skip
    if run.accelerator.is_main_process:
        write_result(config, run.evaluated, images, summary)
    run.accelerator.wait_for_everyone()
    return summary
