"""The images of a run: split, decoded into memory if they fit, sharded over processes, shuffled in each epoch."""

import sys
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from timm.data import Mixup
from torch import Tensor

from ..data import (
    EVALUATION,
    ArrayCache,
    CropFlip,
    LabelledImages,
    Source,
    Split,
    channel_counts,
    channel_statistics,
    compute_rows,
    content_key,
    decode_kept,
    eval_transform,
    fingerprint,
    listed,
    load_source,
    split_validation,
    stratified_sample,
    train_transform,
    with_digests,
)
from ..settings import TrainConfig

_STATISTICS_SAMPLE = 10_000


@dataclass
class Images:
    """Training, validation and test images of a run."""

    class_names: tuple[str, ...]  # in the order of the logits
    data_config: dict[str, Any]  # as in timm: input_size, interpolation, crop_pct, crop_mode, mean, std; all resolved
    train: Split  # all training images; images in memory are not augmented yet
    val: Split | None  # this process's shard; None without validation
    test: Split  # this process's shard
    sizes: dict[str, int]  # images of train, val and test, over all processes
    bad: int  # number of images skipped because they cannot be decoded
    fingerprint: dict[str, int | str]  # see `timm_sugar.data.fingerprint`
    crop_flip: CropFlip | None  # augmentation of the training images in memory; None for none


def open_source(config: TrainConfig, warn: bool = True) -> Source:
    """Return the data set of the settings; `warn` shows its warnings, and is True in only one of several processes."""
    names = ("label_column", "image_column", "split_seed", "streaming", "skip_bad_images")
    with warnings.catch_warnings():
        if not warn:
            warnings.simplefilter("ignore")
        return load_source(config.data, **{name: getattr(config, name) for name in names})


def load_images(config: TrainConfig, source: Source, rank: int, processes: int) -> Images:
    """Split the images, decode those that fit into `memory_limit`, and resolve mean and standard deviation."""
    source = with_digests(source)
    found = fingerprint(source)
    first, *others = gather_object([found])
    for process, other in enumerate(others, 1):
        differs = [f"{name}={first[name]} and {other[name]}" for name in first if other[name] != first[name]]
        if differs:
            what = f"processes 0 and {process} do not have the same data {source.name!r}"
            raise ValueError(f"{what}: {'; '.join(differs)}")
    parts = _split(config, source, warn=rank == 0)
    _check_sizes(config, len(parts["train"]), processes)
    sizes = {name: len(part) for name, part in parts.items()}
    parts |= {name: parts[name].subset(np.arange(rank, sizes[name], processes)) for name in ("val", "test")}
    data_config: dict[str, Any] = dict(
        input_size=(3, config.img_size, config.img_size),
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
        crop_mode="center",
    )
    evaluation = eval_transform(data_config)
    by_image = config.crop == "resized" or any((config.color_jitter, config.auto_augment, config.re_prob))
    by_batch = not by_image and (config.crop == "padded" or config.hflip > 0)
    room = config.memory_limit * 2**30
    cache = ArrayCache(config.cache_limit * 2**30, *([partial(print, file=sys.stderr)] if rank == 0 else []))
    pixels: dict[str, Tensor | None] = {}
    for name in ("val", "test", "train"):  # in the order in which they get memory
        part = parts[name]
        room -= len(part) * 3 * config.img_size**2
        held = room >= 0 and len(part) > 0 and not (name == "train" and by_image)
        title = f"decoding {name} images" if rank == 0 else None
        # A padded crop is taken from the whole image.
        whole = data_config | {"crop_pct": 1.0} if name == "train" and config.crop == "padded" else data_config
        pixels[name] = decode_kept(part, whole, cache, title) if held else None
        if name == "test" and not held and not config.skip_bad_images:
            _check_readable(part, cache, title)  # otherwise they are first read at the end of the run

    measured: Any = ((), ())
    if config.mean is None or config.std is None:
        title = "measuring mean and standard deviation" if rank == 0 else None
        measured = _statistics(parts["train"], None if by_batch else pixels["train"], data_config, cache, title)
    data_config |= dict(mean=tuple(config.mean or measured[0]), std=tuple(config.std or measured[1]))
    splits = {
        name: Split(torch.from_numpy(part.labels), pixels[name], part, evaluation) for name, part in parts.items()
    }
    if by_image or by_batch:
        names = ("crop", "hflip", "color_jitter", "auto_augment", "re_prob", "re_mode", "re_count")
        splits["train"].transform = train_transform(data_config, **{name: getattr(config, name) for name in names})
    crop_flip = CropFlip(4 if config.crop == "padded" else 0, config.hflip) if by_batch else None
    val = splits["val"] if sizes["val"] else None
    return Images(
        source.class_names, data_config, splits["train"], val, splits["test"], sizes, source.bad_images, found,
        crop_flip,
    )  # fmt: skip


def _split(config: TrainConfig, source: Source, warn: bool) -> dict[str, LabelledImages]:
    train, val = split_validation(source.train, config.val_fraction, config.split_seed)
    parts = dict(train=train, val=val, test=source.test)
    for name, part in parts.items():
        limit = getattr(config, f"limit_{name}")
        if limit is not None:
            parts[name] = part.subset(stratified_sample(part.labels, limit, config.split_seed))
    if config.val_fraction and not len(parts["val"]):
        raise ValueError(f"val_fraction {config.val_fraction} of {len(source.train)} images leaves none to validate on")
    for name, what in (("train", "training"), ("val", "validation")):
        missing = np.setdiff1d(source.train.labels, parts[name].labels)
        if warn and len(parts[name]) and len(missing):
            warnings.warn(f"no {what} image of {listed([source.class_names[m] for m in missing])}", stacklevel=2)
    return parts


def _check_sizes(config: TrainConfig, count: int, processes: int) -> None:
    if count < 2 * processes and config.batch_size > 1:  # BatchNorm needs at least two images for a variance
        raise ValueError(f"{count} training images are too few: a forward pass takes at least two in each process")
    wanted = config.batch_size * config.grad_accum * processes
    if count < wanted and (config.grad_accum > 1 or config.mixup or config.cutmix):
        raise ValueError(
            f"{count} training images are fewer than a step takes: batch_size {config.batch_size} x grad_accum "
            f"{config.grad_accum} x {processes} processes"
        )


def _statistics(
    images: LabelledImages, pixels: Tensor | None, data_config: dict[str, Any], cache: ArrayCache, title: str | None
) -> Any:
    """Return mean and std of the images in memory, or of a stratified sample at original size if there are none."""
    how = [data_config[name] for name in EVALUATION]
    if pixels is None:
        images, how = images.subset(stratified_sample(images.labels, _STATISTICS_SAMPLE, 0)), ["own size"]

    def count(index: int) -> np.ndarray:
        return channel_counts(torch.from_numpy(np.array(images[index])).permute(2, 0, 1)[None]).numpy().view(np.uint8)

    def measure() -> np.ndarray:
        if pixels is None:
            counts = torch.from_numpy(compute_rows(count, (len(images), 3, 256 * 8), title).view(np.int64).sum(0))
        else:
            counts = channel_counts(pixels)
        return np.array(channel_statistics(counts)).view(np.uint8)

    key = content_key(images, "statistics", *how)
    return cache.array(key, (2, 24), measure).view(np.float64).tolist()


def _check_readable(images: LabelledImages, cache: ArrayCache, title: str | None) -> None:
    """Decode every image unless an earlier call did; raise BadImageError if one cannot be decoded."""

    def check() -> np.ndarray:
        compute_rows(lambda index: images[index] is None, (len(images),), title)
        return np.ones(1, np.uint8)

    cache.array(content_key(images, "readable"), (1,), check)


def make_mixup(config: TrainConfig, num_classes: int) -> Mixup | None:
    """Return timm's Mixup/CutMix, which also applies label smoothing; None if both are off."""
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


def mix_seeds(*parts: int) -> int:
    """Combine several numbers to one 63-bit seed; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """Return the order of the training images in an epoch: a permutation of range(count), int64 (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix_seeds(seed, epoch)))
