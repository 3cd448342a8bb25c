"""The network and optimizer of a run, and the synchronisation of BatchNorm statistics."""

import copy
from typing import Any

import timm
import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from ..data import Source
from ..init import pytorch_default_
from ..models import build, size_arguments
from ..settings import TrainConfig
from ..surrogates import unknown_name


def check_names(config: TrainConfig) -> None:
    """Raise ValueError, with the nearest valid name, for an unknown model or optimizer."""
    if not timm.is_model(config.model.split(".")[0]):
        raise ValueError(unknown_name("model", config.model, timm.list_models()))
    if config.opt not in list_optimizers():
        raise ValueError(unknown_name("optimizer", config.opt, [str(name) for name in list_optimizers()]))


def build_network(config: TrainConfig, source: Source) -> nn.Module:
    """Build the network with weights that depend on the seed only, and run one image of zeros through it.

    Raises:
        ValueError: it does not take these arguments, the classes of the data or images of this size.
    """
    torch.manual_seed(config.seed)
    classes = len(source.class_names)
    arguments = size_arguments(config.model, config.img_size) | {"num_classes": classes} | config.model_args
    if arguments["num_classes"] != classes:
        given = arguments["num_classes"]
        raise ValueError(f"data set {source.name!r} has {classes} classes, the model {given}")
    try:
        network = build(config.model, **config.activation.given(), **arguments)
    except TypeError as error:
        raise ValueError(f"model {config.model} does not take these arguments: {error}") from error
    if config.init == "pytorch":
        pytorch_default_(network)
    training, image = network.training, torch.zeros(1, 3, config.img_size, config.img_size)
    try:
        with torch.no_grad():
            network.eval()(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = f"{error}".partition("\n")[0]
        message = f"model {config.model} does not take images of img_size {config.img_size}: {reason}"
        raise ValueError(message) from error
    if config.batch_size == 1 and not (config.sync_bn or config.eval_only):
        try:
            with torch.no_grad():
                copy.deepcopy(network).train()(image)
        except ValueError as error:  # of BatchNorm, to which a channel of one image is one value
            raise ValueError(
                f"model {config.model} cannot be trained with batch_size 1 at img_size {config.img_size}: BatchNorm "
                "would see one value a channel; give it two images or more"
            ) from error
    return network.train(training)


def create_optimizer(config: TrainConfig, network: nn.Module, lr_scale: float) -> torch.optim.Optimizer:
    """Return timm's optimizer; `lr_scale` multiplies the learning rate."""
    moments: dict[str, Any] = {"eps": config.opt_eps, "betas": config.opt_betas}
    return create_optimizer_v2(
        network,
        opt=config.opt,
        lr=lr_scale * config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        **{name: value for name, value in moments.items() if value is not None},
    )


def average_batch_norm(network: nn.Module) -> None:
    """Average the running statistics of every BatchNorm over the processes.

    Running statistics are linear in those of the batches, so doing so after each step gives what a single average at
    the end would, and every process, and any checkpoint, has the same.
    """
    if not dist.is_initialized():
        return
    buffers = [
        buffer
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
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
