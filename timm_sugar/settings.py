"""Settings of a training run: one field each, with its help text, range and group in --help."""

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from .layers import Activation
from .surrogates import unknown_name

# What a setting affects:
#   data    the images used for training, validation and test; only runs with the same data settings are comparable
#   result  the resulting weights; like data, must not change when a run resumes
#   free    how the run is computed; may change when a run resumes
#   start   a single invocation: its output folder and mode
Kind = Literal["data", "result", "free", "start"]


# Expected values, for error messages.
_WANTED = {
    int: "a whole number", float: "a finite number", str: "text that is not empty", bool: "true or false",
    list: "a list", dict: "KEY=VALUE pairs",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Metadata of a setting, besides its name, type and default."""

    help: str
    group: str  # heading in --help
    kind: Kind = "result"
    range: str | None = None  # interval of the value, or of each value of a list, such as "[0, 1)"
    length: int | None = None  # length of a list; None for any
    metavar: str | None = None  # placeholder of the value in --help
    otherwise: Any = None  # default without pretrained weights, for a setting whose default comes from such weights
    bare: str | None = None  # meaning of the flag without a value, or of true in YAML; None if it needs a value


def setting(default: Any, help: str, range: str | None = None, **more: Any) -> Any:
    """Return the dataclass field of a setting; the arguments are the same as for `Setting`."""
    metadata = {"setting": Setting(help, range=range, **more)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


_data = partial(setting, group="data", kind="data")
_load = partial(setting, group="data", kind="free")
_images = partial(setting, group="data")
_augment = partial(setting, group="augmentation")
_network = partial(setting, group="network")
_opt = partial(setting, group="optimization")
_run = partial(setting, group="run")
_free = partial(setting, group="run", kind="free")
_start = partial(setting, group="run", kind="start")


@dataclass
class TrainConfig:
    """All settings of a run. A recipe can set any of them, and flags override the recipe."""

    data: str = _data("digits", "digits, cifar10, cifar100, tiny-imagenet, a Hub data set id, or a local folder")
    label_column: str | None = _data(None, "column of the class labels; default: label, labels or fine_label")
    image_column: str | None = _data(None, "column of the images; default: image, img or the only image column")
    img_size: int = _images(None, "side of the square input images, pixels", "[1, 4096]", otherwise=32)
    interpolation: Literal["nearest", "bilinear", "bicubic"] = _images(
        None, "how images are resized", otherwise="bicubic"
    )
    crop_pct: float = _images(
        None, "evaluation resizes to img_size / crop_pct and crops the centre", "[0.1, 1]", otherwise=1.0
    )
    mean: list[float] | None = _images(
        None,
        "mean for normalisation of pixels in [0, 1]; default: that of the pretrained weights, else of the training "
        "images",
        "[0, 1]",
        length=3,
    )
    std: list[float] | None = _images(None, "standard deviation, as for mean", "[0.001, 1]", length=3)
    val_fraction: float = _data(0.1, "share of the training images split off for validation; 0 for none", "[0, 1)")
    split_seed: int = _data(
        0,
        "seed of that split and of --limit-train, --limit-val and --limit-test; independent of --seed",
        "[0, 4294967295]",
    )
    limit_train: int | None = _images(None, "train on a stratified sample of this many images", "[1, inf)")
    limit_val: int | None = _data(None, "validate on a stratified sample of this many images", "[1, inf)")
    limit_test: int | None = _data(None, "test on a stratified sample of this many images", "[1, inf)")
    streaming: bool = _load(False, "read the data into memory without a cached copy on disk")
    skip_bad_images: bool = _images(False, "skip and count images that cannot be decoded")
    memory_limit: float = _load(
        4.0, "GiB of decoded images to keep in memory; the rest is decoded on the fly", "[0, inf)"
    )
    cache_limit: float = _load(8.0, "GiB of decoded images to keep on disk for the next start; 0 for none", "[0, inf)")
    workers: int = _load(2, "loader processes per training process", "[0, 1024]")

    crop: Literal["none", "resized", "padded"] = _augment(
        "none", "crops in training: none, timm's random resized crop, or random after padding by 4 pixels"
    )
    hflip: float = _augment(0.0, "probability of a horizontal flip", "[0, 1]")
    color_jitter: float | None = _augment(
        None, "strength of colour jitter; as in timm, ignored with auto_augment", "[0, 10]"
    )
    auto_augment: str | None = _augment(None, "timm's policy, such as rand-m9-mstd0.5-inc1")
    re_prob: float = _augment(0.0, "probability of random erasing", "[0, 1]")
    re_mode: Literal["const", "rand", "pixel"] = _augment("pixel", "fill of random erasing")
    re_count: int = _augment(1, "maximum number of erased areas", "[1, 1000]")
    mixup: float = _augment(0.0, "alpha of Mixup; 0 disables it", "[0, 1000]")
    cutmix: float = _augment(0.0, "alpha of CutMix; 0 disables it", "[0, 1000]")
    mixup_prob: float = _augment(1.0, "probability of Mixup or CutMix per batch, pair or image", "[0, 1]")
    mixup_switch_prob: float = _augment(0.5, "probability of CutMix if both are enabled", "[0, 1]")
    mixup_mode: Literal["batch", "pair", "elem"] = _augment("batch", "granularity of mixing")
    smoothing: float = _augment(0.0, "label smoothing", "[0, 1)")

    model: str = _network(
        None,
        "a model of timm's registry, including ours; or a source of initial weights as in --pretrained",
        otherwise="resnet18_sugar_bsilu",
    )
    model_args: dict[str, Any] = _network({}, "additional arguments of the model", metavar="KEY=VALUE")
    pretrained: str | None = _network(
        None,
        "start from these weights: a model of timm's registry, with or without a tag (resnet50.a1_in1k), a run's "
        "folder, ORG/NAME or hf-hub:ORG/NAME on the Hub, or local-dir:FOLDER; without SOURCE, those of --model",
        metavar="SOURCE",
        bare="own",
    )
    initial_checkpoint: str | None = _network(
        None, "start from the weights in this file: .safetensors, or written by torch.save", metavar="FILE"
    )
    convert: bool = _network(
        False, "replace the activations of any model by SUGAR, with --surrogate (default bsilu) and --alpha"
    )
    freeze: list[str] = _network(
        [], "parameters to freeze: names of modules or parameters, or fnmatch patterns", metavar="PATTERN"
    )
    surrogate: str | None = _network(None, "surrogate instead of the model's own")
    alpha: float | None = _network(None, "shape parameter of the surrogate", "[-1e6, 1e6]")
    act_layer: str | None = _network(None, "activation instead of SUGAR, by timm's name: relu, gelu, nelu, ...")
    init: Literal["timm", "pytorch"] = _network(
        "timm", "initialisation of convolutions and linear layers: that of timm's model, or the default of torch.nn"
    )
    alpha_schedule: Literal["constant", "linear", "cosine"] = _network(
        "constant", "how alpha changes from its first value to alpha_end, per epoch"
    )
    alpha_end: float | None = _network(None, "alpha in the last epoch, or the last before switch_epoch", "[-1e6, 1e6]")
    switch_epoch: int | None = _network(None, "first epoch, counted from 1, with switch_surrogate")
    switch_surrogate: str | None = _network(None, "surrogate from that epoch on")
    switch_alpha: float | None = _network(None, "alpha of switch_surrogate; default: its default alpha", "[-1e6, 1e6]")

    epochs: int = _opt(10, "passes over the training images", "[1, 1000000]")
    patience: int | None = _opt(
        None, "stop after this many consecutive epochs without a better validation accuracy", "[1, inf)"
    )
    batch_size: int = _opt(128, "images per forward pass in each process", "[1, 1000000]")
    grad_accum: int = _opt(1, "forward passes per optimizer step", "[1, 1000000]")
    opt: str = _opt("sgd", "optimizer, by timm's name: sgd, adamw, ...")
    opt_betas: list[float] | None = _opt(None, "betas of the optimizer, if it has them", "[0, 1)", length=2)
    opt_eps: float | None = _opt(None, "epsilon of the optimizer, if it has one", "(0, 1000]")
    lr: float = _opt(0.001, "learning rate", "[0, 1e30]")
    lr_base_batch: int | None = _opt(
        None,
        "batch size for which lr, warmup_lr and min_lr are given; they are scaled linearly to the actual one",
        "[1, 1000000000]",
    )
    momentum: float = _opt(0.9, "momentum of SGD", "[0, 1]")
    weight_decay: float = _opt(0.0, "weight decay; not applied to normalisation layers and biases", "[0, 1e30]")
    weight_decay_end: float | None = _opt(
        None, "weight decay at the end of training, reached on a cosine; default: constant", "[0, 1e30]"
    )
    layer_decay: float | None = _opt(
        None, "factor of the learning rate from each layer to the previous one, as in timm", "(0, 1]"
    )
    clip_grad: float | None = _opt(None, "maximum norm of the gradients", "(0, inf)")
    sched: Literal["constant", "multistep", "cosine"] = _opt("constant", "learning-rate schedule")
    milestones: list[int] = _opt([], "epochs at which a multistep schedule decays", "[1, 1000000]")
    decay_rate: float = _opt(0.1, "factor of the learning rate at each milestone", "[0, 1000]")
    warmup_epochs: float | None = _opt(None, "epochs of warm-up; default: none, or 10% for cosine", "[0, 1000000]")
    warmup_lr: float = _opt(0.0, "learning rate at the start of warm-up", "[0, 1e30]")
    min_lr: float = _opt(0.0, "learning rate at the end of a cosine schedule", "[0, 1e30]")
    ema_decay: float | None = _opt(None, "evaluate and package an exponential moving average of the weights", "[0, 1)")
    sync_bn: bool = _opt(False, "synchronise BatchNorm statistics over all processes; GPUs only")

    seed: int = _run(42, "seed of initialisation, order of the images and randomness in training", "[0, 4294967295]")
    output: str | None = _start(None, "folder of the run; default: output/RECIPE-MODEL-SEED", metavar="DIR")
    resume: str = _start("auto", "auto: resume the run in OUTPUT; never: start over; or a checkpoint's folder")
    checkpoint_minutes: float = _free(10.0, "minutes between checkpoints within an epoch", "[0, inf)")
    checkpoint_steps: int | None = _free(None, "steps between additional checkpoints within an epoch", "[1, inf)")
    mixed_precision: Literal["no", "bf16", "fp16"] = _run("no", "precision of training; evaluation uses float32")
    compile: bool = _run(False, "train with torch.compile, on a GPU also with a CUDA graph")
    channels_last: bool = _run(False, "train with images and weights in channels-last memory format, often faster")
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = _free("none", "tracker that receives the metrics")
    push_to_hub: str | None = _start(None, "publish the finished run to this repository", metavar="ORG/NAME")
    eval_only: bool = _start(False, "evaluate the best weights in OUTPUT, or of the checkpoint in --resume, and stop")
    dry_run: bool = _start(False, "build everything, run two steps and print an estimate of time, memory and disk")

    @property
    def folder(self) -> Path:
        """The folder of the run; ValueError if there is none. Only the command line has a default."""
        if self.output is None:
            raise ValueError("output must be given: the folder of the run")
        return Path(self.output)

    @property
    def activation(self) -> Activation:
        """The activation given in the settings, which replaces that of the model."""
        return Activation(self.surrogate, self.alpha, act_layer=self.act_layer)

    def __post_init__(self) -> None:
        settings, kinds = all_settings(), setting_types()
        for name, known in settings.items():
            object.__setattr__(self, name, _convert(name, getattr(self, name), known, kinds[name]))
        _name_source(self)
        if self.pretrained is None and self.initial_checkpoint is None:
            for name, known in settings.items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, known.otherwise)
        _check_together(self)


def all_settings() -> dict[str, Setting]:
    """Return the metadata of each setting, by name."""
    return {spec.name: spec.metadata["setting"] for spec in dataclasses.fields(TrainConfig)}


def setting_types() -> dict[str, Any]:
    """Return the type of each setting by name."""
    hints = typing.get_type_hints(TrainConfig)
    return {
        name: hints[name] if known.otherwise is None else hints[name] | None for name, known in all_settings().items()
    }


def to_setting(name: str, value: Any) -> Any:
    """Convert the value of a setting, from YAML or the command line, to its type, or raise ValueError."""
    return _convert(name, value, all_settings()[name], setting_types()[name])


def _convert(name: str, value: Any, known: Setting, kind: Any) -> Any:
    if known.bare is not None and isinstance(value, bool):
        value = known.bare if value else None
    value = _coerce(name, value, kind)
    _check_value(name, value, known)
    return value


def defaults() -> dict[str, Any]:
    """Return the default settings of a run."""
    return dataclasses.asdict(TrainConfig())


def names_of(*kinds: Kind) -> list[str]:
    """Return the names of the settings of these kinds."""
    return [name for name, known in all_settings().items() if known.kind in kinds]


def to_flags(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as command-line flags: ``{"img_size": 32}`` as ``["--img-size", "32"]``."""
    flags: list[str] = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, dict):
            flags += [flag, *(f"{key}={json.dumps(item, ensure_ascii=False)}" for key, item in value.items())]
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        else:
            flags += [flag, "none" if value is None else str(value)]
    return flags


def without_none(kind: Any) -> Any:
    """Return T for a type ``T | None``; other types unchanged."""
    others = [k for k in typing.get_args(kind) if k is not type(None)]
    return others[0] if len(others) < len(typing.get_args(kind)) else kind


def _coerce(name: str, value: Any, optional: Any) -> Any:
    """Convert `value`, from YAML or the text of the command line, to a type that may be optional."""
    kind = without_none(optional)
    if kind is not optional and value in (None, "none", ["none"]):  # text on the command line
        return None
    if value is None:
        raise ValueError(f"{name} must not be empty")
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        value = "no" if value is False else value  # YAML parses no as False
        if value not in inner:
            raise ValueError(unknown_name(name, value, list(inner)))
        return value
    if origin is list and isinstance(value, (list, tuple)):
        return [_coerce(name, item, inner[0]) for item in value]
    if kind is str and isinstance(value, (str, Path)) and str(value).strip() and "\0" not in str(value):
        return str(value)
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = kind(value)
            if number == float(value) and math.isfinite(number):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
    if (origin or kind) in (bool, dict) and isinstance(value, origin or kind):
        return value
    raise ValueError(f"{name} must be {_WANTED[origin or kind]}, got {value!r:.60}")


def _check_value(name: str, value: Any, known: Setting) -> None:
    """Raise ValueError if a value, or one of a list, is out of range, or a list has the wrong length."""
    if value is None:
        return
    values = value if isinstance(value, list) else [value]
    if known.length is not None and len(values) != known.length:
        raise ValueError(f"{name} must have {known.length} values, got {value}")
    if known.range is None:
        return
    low, high = (float(bound) for bound in known.range[1:-1].split(","))
    closed_low, closed_high = known.range[0] == "[", known.range[-1] == "]"
    for item in values:
        if not ((item >= low if closed_low else item > low) and (item <= high if closed_high else item < high)):
            wanted = f"at least {low:g}" if closed_low else f"above {low:g}"
            if math.isfinite(high):
                wanted += f" and {'at most' if closed_high else 'below'} {high:g}"
            raise ValueError(f"{name} must be {wanted}, got {item}")


def _name_source(config: TrainConfig) -> None:
    """Split a name that gives both the network and its initial weights into `model` and `pretrained`."""
    given = config.model
    if given is not None and (":" in given or "/" in given):  # ``--model local-dir:FOLDER``
        if config.pretrained not in (None, "own"):
            raise ValueError(f"model {given} and pretrained {config.pretrained} are two sources of weights; give one")
        config.model, config.pretrained = typing.cast(str, None), given
    elif config.pretrained == "own":
        if given is None:
            raise ValueError("pretrained needs a model, or a source: which weights?")
        config.model, config.pretrained = given.partition(".")[0], given


def _check_together(config: TrainConfig) -> None:
    """Raise ValueError if settings contradict each other, or one is missing that another needs."""
    if config.switch_epoch is not None and not 2 <= config.switch_epoch <= config.epochs:
        wanted = f"from 2 to the number of epochs, {config.epochs}"
        raise ValueError(f"switch_epoch must be {wanted}, got {config.switch_epoch}")
    if config.sched == "multistep" and not config.milestones:
        raise ValueError("sched multistep needs milestones, the epochs at which it decays")
    if (config.alpha_schedule == "constant") != (config.alpha_end is None):
        raise ValueError("alpha_schedule linear or cosine and alpha_end need each other")
    if (config.switch_epoch is None) != (config.switch_surrogate is None):
        raise ValueError("switch_epoch and switch_surrogate need each other")
    if config.switch_alpha is not None and config.switch_surrogate is None:
        raise ValueError("switch_alpha needs switch_epoch and switch_surrogate")
    sources = [name for name in ("pretrained", "initial_checkpoint") if getattr(config, name) is not None]
    if len(sources) == 2:
        raise ValueError("pretrained and initial_checkpoint are two sources of weights; give one")
    if sources and config.init != "timm":
        raise ValueError(f"init {config.init} would draw the weights of {sources[0]} anew; leave one of them out")
    if config.initial_checkpoint is not None and config.model is None:
        raise ValueError("initial_checkpoint needs a model: a file of weights does not say which network it is of")
    for name in ("pretrained", "checkpoint_path"):
        if name in config.model_args:
            instead = "initial_checkpoint" if name == "checkpoint_path" else name
            raise ValueError(f"model_args cannot hold {name}: give {instead} itself, which also says how images look")
    if config.patience is not None and not config.val_fraction:
        raise ValueError("patience needs validation images, and val_fraction is 0")
    if config.convert and config.act_layer is not None:
        raise ValueError("convert puts SUGAR in place of the activations, and act_layer another; give one of them")
    if config.dry_run and config.eval_only:
        raise ValueError("dry_run and eval_only contradict each other; give one of them")
    if config.weight_decay_end is not None and not config.weight_decay:
        raise ValueError("weight_decay_end needs a weight_decay above 0 to start from")
    if (config.mixup or config.cutmix) and config.batch_size % 2:
        raise ValueError(f"Mixup and CutMix need an even batch_size, got {config.batch_size}")
