"""Settings of a training run: one dataclass, every value of it checked."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..surrogates import unknown_name


def _setting(default: Any, help: str, metavar: str | None = None) -> Any:
    metadata = {"help": help, "metavar": metavar}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Every setting of a run; a recipe may hold any of them, and the command line any of them again."""

    data: str = _setting("digits", "digits, cifar10, cifar100, tiny-imagenet, a Hub data set id, or a local folder")
    label_column: str | None = _setting(None, "column of the class labels, where it is not label, labels or fine_label")
    img_size: int = _setting(32, "side of the square input images, pixels")
    interpolation: Literal["nearest", "bilinear", "bicubic"] = _setting("bicubic", "how images are resized")
    crop_pct: float = _setting(1.0, "evaluation resizes to img_size / crop_pct and crops the centre")
    mean: list[float] | None = _setting(None, "normalisation, of pixels in [0, 1]; default: of the training images")
    std: list[float] | None = _setting(None, "likewise")
    val_fraction: float = _setting(0.1, "share of the training images split off for validation; 0 for none")
    split_seed: int = _setting(0, "seed of that split and of --limit-train and --limit-val, apart from --seed")
    limit_train: int | None = _setting(None, "train on a stratified sample of so many images")
    limit_val: int | None = _setting(None, "validate on a stratified sample of so many images")
    streaming: bool = _setting(False, "read the data once into memory, without a copy on disk")
    skip_bad_images: bool = _setting(False, "leave out images that cannot be decoded, and count them")
    memory_limit: float = _setting(4.0, "GiB; images that take more when decoded are decoded as they are needed")
    workers: int = _setting(2, "processes, for each training process, that decode and augment images")

    crop: Literal["none", "resized", "padded"] = _setting(
        "none", "crops in training: none, timm's random resized crop, or random after padding by 4 pixels"
    )
    hflip: float = _setting(0.0, "probability of a horizontal flip")
    color_jitter: float | None = _setting(None, "strength of colour jitter; as in timm, none beside auto_augment")
    auto_augment: str | None = _setting(None, "timm's policy, such as rand-m9-mstd0.5-inc1")
    re_prob: float = _setting(0.0, "probability of random erasing")
    re_mode: Literal["const", "rand", "pixel"] = _setting("pixel", "what random erasing fills in")
    re_count: int = _setting(1, "areas erased at most")
    mixup: float = _setting(0.0, "alpha of Mixup; 0 for none")
    cutmix: float = _setting(0.0, "alpha of CutMix; 0 for none")
    mixup_prob: float = _setting(1.0, "probability of either, for a batch, pair or image")
    mixup_switch_prob: float = _setting(0.5, "probability of CutMix where both are on")
    mixup_mode: Literal["batch", "pair", "elem"] = _setting("batch", "what is mixed alike: a batch, a pair, an image")
    smoothing: float = _setting(0.0, "label smoothing")

    model: str = _setting("resnet18_sugar_bsilu", "a model of timm's registry, ours included")
    model_args: dict[str, Any] = _setting({}, "further arguments of the model", "KEY=VALUE")
    surrogate: str | None = _setting(None, "surrogate in place of the model's own")
    alpha: float | None = _setting(None, "shape parameter of the surrogate")
    act_layer: str | None = _setting(None, "an activation by timm's name in place of SUGAR: relu, gelu, nelu, ...")
    alpha_schedule: Literal["constant", "linear", "cosine"] = _setting(
        "constant", "how alpha goes from its first value to alpha_end, epoch by epoch"
    )
    alpha_end: float | None = _setting(None, "alpha in the last epoch, or the last before switch_epoch")
    switch_epoch: int | None = _setting(None, "first epoch, counted from 1, that is trained with switch_surrogate")
    switch_surrogate: str | None = _setting(None, "surrogate from that epoch on")
    switch_alpha: float | None = _setting(None, "its alpha; default: its own")

    epochs: int = _setting(10, "passes over the training images")
    batch_size: int = _setting(128, "images in a forward pass in each process")
    grad_accum: int = _setting(1, "forward passes in a step of the optimizer")
    opt: str = _setting("sgd", "optimizer, by timm's name: sgd, adamw, ...")
    opt_betas: list[float] | None = _setting(None, "its betas, where it has them")
    opt_eps: float | None = _setting(None, "its epsilon, where it has one")
    lr: float = _setting(0.001, "learning rate")
    lr_base_batch: int | None = _setting(
        None, "lr, warmup_lr and min_lr are for a step of so many images, and scaled linearly to the real number"
    )
    momentum: float = _setting(0.9, "momentum of SGD")
    weight_decay: float = _setting(0.0, "weight decay; normalisation and biases are left out")
    weight_decay_end: float | None = _setting(None, "weight decay at the end, reached on a cosine; default: constant")
    clip_grad: float | None = _setting(None, "largest norm of the gradients")
    sched: Literal["constant", "multistep", "cosine"] = _setting("constant", "learning-rate schedule")
    milestones: list[int] = _setting([], "epochs at which a multistep schedule decays")
    decay_rate: float = _setting(0.1, "factor of each of those decays")
    warmup_epochs: float | None = _setting(None, "epochs of warm-up; default: none, or 10% for cosine")
    warmup_lr: float = _setting(0.0, "learning rate at the start of warm-up")
    min_lr: float = _setting(0.0, "learning rate at the end of a cosine")
    ema_decay: float | None = _setting(None, "evaluate and package an exponential moving average of the weights")
    sync_bn: bool = _setting(False, "BatchNorm over the images of all processes, else of each alone; GPUs only")

    seed: int = _setting(42, "seed of initialisation, order, and randomness in training")
    output: str | None = _setting(None, "folder of the run; default: output/RECIPE-MODEL-SEED", "DIR")
    resume: str = _setting("auto", "auto: go on where the run in OUTPUT stopped; never; or a checkpoint's folder")
    checkpoint_minutes: float = _setting(10.0, "minutes between checkpoints within an epoch")
    checkpoint_steps: int | None = _setting(None, "steps between checkpoints within an epoch, besides")
    mixed_precision: Literal["no", "bf16", "fp16"] = _setting("no", "precision of training; evaluation is float32")
    compile: bool = _setting(False, "train through torch.compile")
    channels_last: bool = _setting(False, "train with images and weights in channels-last order, often faster")
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = _setting("none", "where metrics are sent besides")
    push_to_hub: str | None = _setting(None, "publish the finished run as this repository", "ORG/NAME")
    eval_only: bool = _setting(False, "evaluate the best weights in OUTPUT, or of the checkpoint in --resume, and stop")
    dry_run: bool = _setting(False, "build everything, run two steps, and say what the run will take")

    @property
    def folder(self) -> Path:
        """The folder of the run.

        Raises:
            ValueError: there is none; only the command line has a default.
        """
        if self.output is None:
            raise ValueError("output must be given: the folder of the run")
        return Path(self.output)

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            object.__setattr__(
                self, spec.name, _coerce(spec.name, getattr(self, spec.name), setting_types()[spec.name])
            )
        _check(self)


# What can change between two starts of a run without changing its weights.
FREE_SETTINGS = frozenset(
    ("output", "resume", "checkpoint_minutes", "checkpoint_steps", "workers", "memory_limit", "streaming")
    + ("tracker", "push_to_hub", "eval_only", "dry_run")
)


def setting_types() -> dict[str, Any]:
    """Return the type of each setting by name."""
    return typing.get_type_hints(TrainConfig)


def without_none(kind: Any) -> Any:
    """Return the type itself of a type that None may stand in for."""
    if isinstance(kind, types.UnionType):
        return next(k for k in typing.get_args(kind) if k is not type(None))
    return kind


def _coerce(name: str, value: Any, kind: Any) -> Any:
    """Return `value` as `kind`, from YAML or from the command line's text."""
    if value is None or (value == "none" and isinstance(kind, types.UnionType)):  # as the command line says it
        if isinstance(kind, types.UnionType):
            return None
        raise ValueError(f"{name} must not be empty")
    kind = without_none(kind)
    origin = typing.get_origin(kind)
    if origin is Literal:
        value = {False: "no"}.get(value, value) if isinstance(value, bool) else value  # YAML reads no as false
        if value not in typing.get_args(kind):
            raise ValueError(unknown_name(name, value, list(typing.get_args(kind))))
        return value
    if origin is dict and isinstance(value, dict):
        return value
    if origin is list and isinstance(value, (list, tuple)):
        return [_coerce(name, item, typing.get_args(kind)[0]) for item in value]
    try:
        if kind is str and isinstance(value, (str, Path)):
            return str(value)
        if kind is bool and isinstance(value, bool):
            return value
        if kind in (int, float) and not isinstance(value, bool):
            number = kind(value)
            if number == float(value) and math.isfinite(number):
                return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} must be {_describe(kind)}, got {value!r}")


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
    return names.get(kind) or ("a list" if typing.get_origin(kind) is list else "KEY=VALUE pairs")


_AT_LEAST_1 = "img_size epochs batch_size grad_accum limit_train limit_val checkpoint_steps lr_base_batch re_count"
_NOT_NEGATIVE = (
    "lr momentum weight_decay weight_decay_end warmup_lr warmup_epochs min_lr checkpoint_minutes seed split_seed "
    "workers memory_limit color_jitter mixup cutmix"
)
_ABOVE_0 = "clip_grad opt_eps"
_BELOW_1 = "val_fraction smoothing ema_decay"
_PROBABILITIES = "hflip re_prob mixup_prob mixup_switch_prob"


def _check(config: TrainConfig) -> None:
    ranges: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
        (_AT_LEAST_1, "at least 1", lambda value: value >= 1),
        (_NOT_NEGATIVE, "at least 0", lambda value: value >= 0),
        (_ABOVE_0, "above 0", lambda value: value > 0),
        (_BELOW_1, "at least 0 and below 1", lambda value: 0 <= value < 1),
        (_PROBABILITIES, "from 0 to 1", lambda value: 0 <= value <= 1),
        ("crop_pct", "above 0 and at most 1", lambda value: 0 < value <= 1),
        ("switch_epoch", f"from 2 to the number of epochs, {config.epochs}", lambda value: 2 <= value <= config.epochs),
    )
    for names, wanted, valid in ranges:
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not valid(value):
                raise ValueError(f"{name} must be {wanted}, got {value}")
    if config.sched == "multistep" and not config.milestones:
        raise ValueError("sched multistep needs milestones, the epochs at which it decays")
    for name, count, what in (("mean", 3, "a channel"), ("std", 3, "a channel"), ("opt_betas", 2, "a moment")):
        value = getattr(config, name)
        if value is not None and len(value) != count:
            raise ValueError(f"{name} must have {count} values, one {what}, got {value}")
    if (config.alpha_schedule == "constant") != (config.alpha_end is None):
        raise ValueError("alpha_schedule linear or cosine and alpha_end need each other")
    if (config.switch_epoch is None) != (config.switch_surrogate is None):
        raise ValueError("switch_epoch and switch_surrogate need each other")
    if config.switch_alpha is not None and config.switch_surrogate is None:
        raise ValueError("switch_alpha needs switch_epoch and switch_surrogate")
    if config.dry_run and config.eval_only:
        raise ValueError("dry_run and eval_only contradict each other; give one of them")
    if config.weight_decay_end is not None and not config.weight_decay:
        raise ValueError("weight_decay_end needs a weight_decay above 0 to start from")
    if (config.mixup or config.cutmix) and config.batch_size % 2:
        raise ValueError(f"Mixup and CutMix need an even batch_size, got {config.batch_size}")
