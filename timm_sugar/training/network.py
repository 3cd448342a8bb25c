"""The network and optimizer of a run, and the synchronisation of BatchNorm statistics."""

import copy
from dataclasses import replace
from typing import Any

import timm
import torch
import torch.distributed as dist
from timm.models import get_arch_pretrained_cfgs, split_model_name_tag
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from ..data import Source
from ..init import pytorch_default_
from ..layers import Activation
from ..models import build, is_own, size_arguments
from ..settings import TrainConfig
from ..surrogates import unknown_name
from .pretrained import Initial


def check_names(config: TrainConfig) -> None:
    """Raise ValueError, with the nearest valid name, for an unknown model, tag or optimizer."""
    if config.model is not None:
        name, tag = split_model_name_tag(config.model)
        if not timm.is_model(name):
            raise ValueError(unknown_name("model", config.model, timm.list_models()))
        if tag:
            tags = [cfg.tag for cfg in get_arch_pretrained_cfgs(name).values() if cfg.tag]
            if tag not in tags:
                raise ValueError(unknown_name(f"tag of {name}", tag, tags))
            raise ValueError(
                f"model {config.model} names weights: --pretrained starts from them, --model {name} without"
            )
    if config.opt not in list_optimizers():
        raise ValueError(unknown_name("optimizer", config.opt, [str(name) for name in list_optimizers()]))


def build_network(config: TrainConfig, source: Source, initial: Initial | None = None) -> nn.Module:
    """Build the network with weights that depend only on the seed, and test a forward pass and a training step.

    The activation and arguments that the settings leave open are those of `initial`.
    """
    torch.manual_seed(config.seed)
    classes = len(source.class_names)
    given = config.model_args.get("num_classes", classes)
    if given != classes:
        raise ValueError(f"data set {source.name!r} has {classes} classes, the model {given}")
    for name, rate in config.model_args.items():  # timm accepts negative rates
        if name.endswith("_rate") and isinstance(rate, (int, float)) and not 0 <= rate < 1:
            raise ValueError(f"model_args {name} must be at least 0 and below 1, got {rate}")
    try:
        arguments = size_arguments(config.model, config.img_size) | {"num_classes": classes}
        arguments |= (initial.model_args if initial else {}) | config.model_args
        network = build(config.model, **_activation(config, initial).given(), **arguments)
    except Exception as error:  # the exception depends on timm's model family
        if config.act_layer is not None and _builds(config.model, arguments):
            sugar = config.act_layer.removeprefix("sugar_")
            instead = f"--convert --surrogate {sugar} does" if sugar != config.act_layer else "--convert puts SUGAR in"
            raise ValueError(
                f"model {config.model} does not take act_layer {config.act_layer} by name ({_reason(error)}); {instead}"
            ) from error
        if isinstance(error, (ValueError, OSError)) and str(error):  # its message is clear
            raise
        raise ValueError(f"model {config.model} does not take these arguments: {_reason(error)}") from error
    if config.init == "pytorch":
        pytorch_default_(network)
    training, image = network.training, torch.zeros(1, 3, config.img_size, config.img_size)
    try:
        with torch.no_grad():
            logits = network.eval()(image)
    except Exception as error:
        raise ValueError(
            f"model {config.model} does not take images of img_size {config.img_size}: {_reason(error)}"
        ) from error
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (1, classes):
        raise ValueError(f"model {config.model} does not give a logit for each of {classes} classes, but {shape}")
    if not config.eval_only:
        _try_training(config, network)
    return network.train(training)


def _activation(config: TrainConfig, initial: Initial | None) -> Activation:
    """Return the activation to build with: that of the settings, else that of the initial network."""
    given, before = config.activation, initial.activation if initial else Activation()
    if given.act_layer is not None:
        return given
    if config.convert:
        before = replace(before, act_layer=None)
    if given.surrogate is not None:  # with its own default alpha
        return replace(given, save=before.save)
    if config.convert and before.surrogate is None and not is_own(config.model):
        before = replace(before, surrogate="bsilu")
    return replace(before, alpha=before.alpha if given.alpha is None else given.alpha)


def _builds(model: str, arguments: dict[str, Any]) -> bool:
    try:
        with torch.device("meta"):
            build(model, **arguments)
    except Exception:  # the exception depends on timm's model family
        return False
    return True


def _try_training(config: TrainConfig, network: nn.Module) -> None:
    """Raise ValueError if a copy of the network cannot be trained on noise images."""
    trial, count = copy.deepcopy(network).train(), min(config.batch_size, 2)
    problem = f"model {config.model} cannot be trained with"
    try:
        with torch.random.fork_rng(devices=()):
            trial(torch.randn(count, 3, config.img_size, config.img_size)).sum().backward()
    except Exception as error:
        if count == 1 and config.sync_bn:  # a single image has no variance, but SyncBatchNorm uses all processes
            return
        if count == 1 and "more than 1 value per channel" in str(error):
            one = f"batch_size 1 at img_size {config.img_size}: BatchNorm would see one value a channel"
            raise ValueError(f"{problem} {one}; give it two images or more") from error
        raise ValueError(f"{problem} these arguments: {_reason(error)}") from error
    if not all(torch.isfinite(p.grad).all() for p in trial.parameters() if p.grad is not None):
        raise ValueError(f"{problem} these arguments: its gradients are not finite")


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def create_optimizer(config: TrainConfig, network: nn.Module, lr_scale: float) -> torch.optim.Optimizer:
    """Return timm's optimizer, or raise ValueError if a test step fails; `lr_scale` multiplies lr."""
    moments: dict[str, Any] = {"eps": config.opt_eps, "betas": config.opt_betas}
    settings: dict[str, Any] = {name: value for name, value in moments.items() if value is not None}
    settings |= dict(
        opt=config.opt, lr=lr_scale * config.lr, weight_decay=config.weight_decay, momentum=config.momentum
    )
    trial = nn.Linear(2, 2)
    try:
        trial(torch.ones(2, 2)).sum().backward()
        create_optimizer_v2(trial, **settings).step()
        optimizer = create_optimizer_v2(network, layer_decay=config.layer_decay, **settings)
    except Exception as error:  # some need a closure, or do not have a setting
        raise ValueError(f"optimizer {config.opt} cannot be used with these settings: {_reason(error)}") from error
    if not all(torch.isfinite(p).all() for p in trial.parameters()):
        raise ValueError(f"optimizer {config.opt} gives weights that are not finite in its first step; lower lr")
    if config.layer_decay not in (None, 1.0) and len({g["lr_scale"] for g in optimizer.param_groups}) == 1:
        raise ValueError(f"layer_decay changes nothing: all that is trained of {config.model} is one layer to timm")
    return optimizer


def average_batch_norm(network: nn.Module) -> None:
    """Average the running statistics of every BatchNorm over the processes.

    Running statistics are linear in the batch statistics, so averaging after each step equals a single average at the
    end, and the statistics are the same in every process and in every checkpoint.
    """
    if not dist.is_initialized():
        return
    buffers = [
        buffer
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training  # not frozen ones
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))
