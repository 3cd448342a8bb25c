"""Building a run from its settings: data, networks, optimizer and schedules, or one line that says what is wrong."""

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils import ModelEmaV3
from torch import nn

from ..data import (
    LabelledImages,
    Source,
    Split,
    available_cpus,
    channel_statistics,
    decode,
    decoded_size,
    eval_transform,
    load_source,
    readable,
    split_validation,
    stratified_sample,
    train_transform,
)
from ..models import build, size_arguments
from ..settings import TrainConfig
from ..surrogates import unknown_name
from .processes import Agreement, on_cpu
from .schedules import check_surrogates, create_lr_schedule

_STATISTICS_SAMPLE = 10_000


@dataclass
class Run:
    """Everything that is built before the first step.

    Attributes:
        config: The settings, with what was left open resolved.
        left_open: Names of the settings that were.
        sizes: Images of train, val and test; in `val` and `test` each process holds a share.
        bad_images: Images left out because they cannot be decoded.
        network: Holds the weights that are trained.
        model: The same as accelerate and torch.compile wrap it.
        evaluated: A second network, in float32, for evaluation and packaging; holds the moving average where one is on.
        surrogate: Surrogate and alpha as built.
    """

    config: TrainConfig
    left_open: list[str]
    accelerator: Accelerator
    agree: Agreement
    class_names: tuple[str, ...]
    data_config: dict[str, Any]
    sizes: dict[str, int]
    bad_images: int
    train: Split
    val: Split | None
    test: Split
    network: nn.Module
    model: nn.Module
    evaluated: nn.Module
    ema: ModelEmaV3 | None
    mixup: Mixup | None
    optimizer: Any
    scheduler: Any
    surrogate: tuple[str | None, float | None]

    @property
    def output(self) -> Path:
        return self.config.folder

    @property
    def step_images(self) -> int:
        """Images in a step of the optimizer, over all processes."""
        processes: int = self.accelerator.num_processes
        full: int = self.config.batch_size * self.config.grad_accum * processes
        return min(full, self.sizes["train"] // processes * processes)

    @property
    def steps_per_epoch(self) -> int:
        """Full steps in an epoch; the images left over differ from epoch to epoch and are not trained on."""
        return self.sizes["train"] // self.step_images

    @property
    def lr_scale(self) -> float:
        base = self.config.lr_base_batch
        return 1.0 if base is None else self.step_images / base


def prepare(config: TrainConfig) -> Run:
    """Build everything, or fail before anything is trained.

    Raises:
        ValueError, OSError, ModuleNotFoundError: one line that says what is wrong with the settings or data.
    """
    if not timm.is_model(config.model.split(".")[0]):
        raise ValueError(unknown_name("model", config.model, timm.list_models()))
    if config.opt not in list_optimizers():
        raise ValueError(unknown_name("optimizer", config.opt, [str(name) for name in list_optimizers()]))
    accelerator = _accelerator(config)

    source = load_source(
        config.data, config.label_column, config.split_seed, config.streaming, image_column=config.image_column
    )
    source, bad_images = _without_bad_images(config, source)
    # Built before the images are decoded, so that a wrong argument fails at once.
    networks = [_build_model(config, source) for _ in range(2)]
    surrogate = check_surrogates(config, networks[0])
    _check_image_size(config, networks[1])
    images = _splits(config, source)
    _check_sizes(config, len(images["train"]), accelerator.num_processes)
    data_config, splits = _load(config, images, accelerator)
    left_open = [name for name in ("mean", "std", "warmup_epochs") if getattr(config, name) is None]
    config = dataclasses.replace(
        config,
        mean=list(data_config["mean"]),
        std=list(data_config["std"]),
        warmup_epochs=config.warmup_epochs
        if config.warmup_epochs is not None
        else 0.1 * config.epochs * (config.sched == "cosine"),
    )

    network, evaluated = (model.to(accelerator.device) for model in networks)
    ema = None
    if config.ema_decay is not None:
        ema = ModelEmaV3(network, decay=config.ema_decay)
        evaluated = ema.module
    evaluated.eval().requires_grad_(False)
    if config.sync_bn:
        network = convert_sync_batchnorm(network)
    if config.channels_last:
        network = network.to(memory_format=torch.channels_last)
    run = Run(
        config, left_open, accelerator, Agreement(), source.class_names, data_config,
        {name: len(split) for name, split in images.items()}, bad_images, **splits,
        network=network, model=network, evaluated=evaluated, ema=ema,
        mixup=_mixup(config, len(source.class_names)), optimizer=None, scheduler=None,
        surrogate=surrogate,
    )  # fmt: skip
    moments: dict[str, Any] = {"eps": config.opt_eps, "betas": config.opt_betas}
    optimizer = create_optimizer_v2(
        network,
        opt=config.opt,
        lr=run.lr_scale * config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        **{name: value for name, value in moments.items() if value is not None},
    )
    model = torch.compile(network) if config.compile else network
    with warnings.catch_warnings():  # newer versions of torch name broadcast_buffers otherwise
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        run.model, run.optimizer = accelerator.prepare(model, optimizer)
    run.scheduler = create_lr_schedule(config, run.optimizer, run.steps_per_epoch, run.lr_scale)
    return run


def _accelerator(config: TrainConfig) -> Accelerator:
    # Kept for the process, where an earlier run may have had another precision.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    if config.tracker != "none":
        _require(config.tracker)
    try:
        accelerator = Accelerator(
            cpu=on_cpu(),
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.grad_accum,
            log_with=None if config.tracker == "none" else config.tracker,
            project_dir=config.output,
            # BatchNorm's statistics are averaged after each step instead.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as error:
        raise ValueError(f"mixed_precision {config.mixed_precision} does not work here: {error}") from error
    if config.sync_bn and accelerator.device.type != "cuda":
        raise ValueError(f"sync_bn needs GPUs: SyncBatchNorm does not work on {accelerator.device.type}")
    if (
        accelerator.is_main_process
        and accelerator.device.type == "cpu"
        and not _has_instructions(config.mixed_precision)
    ):
        warnings.warn(
            f"this CPU has no instructions for {config.mixed_precision}: --mixed-precision no is several times faster",
            stacklevel=2,
        )
    return accelerator


def _has_instructions(precision: str) -> bool:
    """Whether oneDNN computes in this precision on this CPU, or only emulates it."""
    if precision == "no" or not torch.backends.mkldnn.is_available():
        return True
    supported = dict(bf16=torch.ops.mkldnn._is_mkldnn_bf16_supported, fp16=torch.ops.mkldnn._is_mkldnn_fp16_supported)
    return bool(supported[precision]())


def _require(tracker: str) -> None:
    from accelerate.utils import is_tensorboard_available, is_trackio_available, is_wandb_available

    available = dict(tensorboard=is_tensorboard_available, trackio=is_trackio_available, wandb=is_wandb_available)
    if not available[tracker]():
        raise ModuleNotFoundError(f"tracker {tracker} is not installed: pip install {tracker}")


def _build_model(config: TrainConfig, source: Source) -> nn.Module:
    """Build the network with weights that depend on the seed alone."""
    torch.manual_seed(config.seed)
    classes = len(source.class_names)
    arguments = dict(config.model_args)
    if arguments.pop("num_classes", classes) != classes:
        raise ValueError(
            f"data set {source.name!r} has {classes} classes, the model {config.model_args['num_classes']}"
        )
    arguments = size_arguments(config.model, config.img_size) | arguments
    try:
        return build(
            config.model,
            surrogate=config.surrogate,
            alpha=config.alpha,
            act_layer=config.act_layer,
            num_classes=classes,
            **arguments,
        )
    except TypeError as error:
        raise ValueError(f"model {config.model} does not take these arguments: {error}") from error


def _check_image_size(config: TrainConfig, network: nn.Module) -> None:
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, config.img_size, config.img_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = f"{error}".partition("\n")[0]
        raise ValueError(
            f"model {config.model} does not take images of img_size {config.img_size}: {reason}"
        ) from error


def _without_bad_images(config: TrainConfig, source: Source) -> tuple[Source, int]:
    if not config.skip_bad_images:
        return source, 0
    train, test = (images.subset(readable(images, available_cpus())) for images in (source.train, source.test))
    bad = len(source.train) + len(source.test) - len(train) - len(test)
    return dataclasses.replace(source, train=train, test=test), bad


def _splits(config: TrainConfig, source: Source) -> dict[str, LabelledImages]:
    train, val = split_validation(source.train, config.val_fraction, config.split_seed)
    if config.limit_train is not None:
        train = train.subset(stratified_sample(train.labels, config.limit_train, config.split_seed))
    if config.limit_val is not None:
        val = val.subset(stratified_sample(val.labels, config.limit_val, config.split_seed))
    if config.val_fraction and not len(val):
        raise ValueError(f"val_fraction {config.val_fraction} of {len(source.train)} images leaves none to validate on")
    return dict(train=train, val=val, test=source.test)


def _check_sizes(config: TrainConfig, count: int, processes: int) -> None:
    wanted = config.batch_size * config.grad_accum * processes
    if count < wanted and (config.grad_accum > 1 or config.mixup or config.cutmix or count < processes):
        raise ValueError(
            f"{count} training images are fewer than a step takes: batch_size {config.batch_size} x grad_accum "
            f"{config.grad_accum} x {processes} processes"
        )


def _load(
    config: TrainConfig, images: dict[str, LabelledImages], accelerator: Accelerator
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Decode what fits into memory, and resolve the data's statistics."""
    data_config: dict[str, Any] = dict(
        input_size=(3, config.img_size, config.img_size),
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
        crop_mode="center",
    )
    evaluation = eval_transform(data_config)
    rank, processes = accelerator.process_index, accelerator.num_processes
    shares = {name: images[name].subset(np.arange(rank, len(images[name]), processes)) for name in ("val", "test")}
    augmented = config.crop != "none" or any((config.hflip, config.color_jitter, config.auto_augment, config.re_prob))
    room = config.memory_limit * 2**30
    splits: dict[str, Any] = {}  # Split, and None for val where there is none
    for name, part in {**shares, "train": images["train"]}.items():
        room -= decoded_size(part, data_config)
        held = room >= 0 and len(part) > 0 and not (name == "train" and augmented)
        pixels = decode(part, evaluation, available_cpus()) if held else None
        splits[name] = Split(torch.from_numpy(part.labels), pixels, part, evaluation)
    if not len(images["val"]):
        splits["val"] = None

    train = splits["train"]
    measured = channel_statistics(_pixels(train)) if config.mean is None or config.std is None else ((), ())
    data_config |= dict(mean=tuple(config.mean or measured[0]), std=tuple(config.std or measured[1]))
    if augmented:
        names = ("crop", "hflip", "color_jitter", "auto_augment", "re_prob", "re_mode", "re_count")
        train.transform = train_transform(data_config, **{name: getattr(config, name) for name in names})
    return data_config, splits


def _pixels(split: Split) -> Any:
    """Yield the images in memory, else a stratified sample of them at their own size; uint8 (N, 3, H, W)."""
    if split.pixels is not None:
        yield from split.pixels.split(4096)
        return
    for index in stratified_sample(split.images.labels, _STATISTICS_SAMPLE, 0):
        yield torch.from_numpy(np.array(split.images[index])).permute(2, 0, 1)[None]


def _mixup(config: TrainConfig, num_classes: int) -> Mixup | None:
    if not (config.mixup or config.cutmix):
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )
