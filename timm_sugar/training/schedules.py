"""Schedules that depend only on the step or epoch: learning rate, weight decay, surrogate, alpha."""

import math
from dataclasses import replace
from typing import Any

from timm.scheduler import create_scheduler_v2
from torch import nn

from .._timm import shift_milestones
from ..layers import Activation, Sugar
from ..settings import TrainConfig


def create_lr_schedule(config: TrainConfig, optimizer: Any, steps_per_epoch: int, scale: float) -> Any:
    """Return timm's scheduler, updated per step; `scale` multiplies every rate."""
    warmup: Any = config.warmup_epochs  # timm also accepts a fraction of an epoch, unlike its annotation
    scheduler: Any = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=config.epochs,
        decay_milestones=config.milestones,
        decay_rate=config.decay_rate,
        min_lr=scale * config.min_lr,
        warmup_lr=scale * config.warmup_lr,
        warmup_epochs=warmup,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )[0]
    if config.sched == "multistep":
        shift_milestones(scheduler)
    return scheduler


def set_weight_decay(config: TrainConfig, optimizer: Any, progress: float) -> None:
    """Set the weight decay at `progress`, the fraction of completed steps, except for groups without weight decay."""
    if config.weight_decay_end is None:
        return
    decay = anneal("cosine", config.weight_decay, config.weight_decay_end, progress)
    for group in optimizer.param_groups:
        # timm puts parameters without weight decay in a separate group with weight_decay 0.
        group.setdefault("decayed", group["weight_decay"] != 0)
        if group["decayed"]:
            group["weight_decay"] = decay


def activation_at(config: TrainConfig, epoch: int, start: Activation) -> Activation:
    """Return surrogate and alpha of an epoch, counted from 1; `start` are those that the network was built with."""
    if config.switch_epoch is not None and epoch >= config.switch_epoch:
        return Activation(config.switch_surrogate, config.switch_alpha).resolve()
    if config.alpha_end is None or start.alpha is None:
        return start
    last = (config.switch_epoch or config.epochs + 1) - 1
    progress = (epoch - 1) / max(1, last - 1)
    return replace(start, alpha=anneal(config.alpha_schedule, start.alpha, config.alpha_end, progress))


def set_activation(network: nn.Module, activation: Activation) -> None:
    """Set surrogate and alpha of every SUGAR activation of `network`; no-op if `activation` has no surrogate."""
    for module in network.modules():
        if isinstance(module, Sugar) and activation.surrogate is not None:
            module.surrogate, module.alpha = activation.surrogate, activation.alpha


def check_activation(config: TrainConfig, network: nn.Module) -> Activation:
    """Return surrogate and alpha of the network as built, or raise ValueError if their schedules are invalid for it."""
    start = Activation.of(network)
    if config.alpha_end is not None or config.switch_epoch is not None:
        if start.surrogate is None:
            raise ValueError("alpha_schedule and switch_epoch need a network with SUGAR activations")
        if config.alpha_end is not None:
            Activation(start.surrogate, config.alpha_end).resolve()
        activation_at(config, config.epochs, start)
    return start


def anneal(schedule: str, start: float, end: float, progress: float) -> float:
    """Interpolate from `start` to `end`, linearly or on a cosine, at `progress` from 0 to 1."""
    share = progress if schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * share
