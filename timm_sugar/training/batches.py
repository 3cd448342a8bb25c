"""Training batches in the format the network takes, built on the device if the images are there."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..data import normalize
from ..settings import TrainConfig
from .device import to_device
from .images import Images, mix_seeds


def training_batches(
    config: TrainConfig, images: Images, device: torch.device, epoch: int, parts: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield training batches; if the images are on the device, only the first batch synchronises with it.

    Randomness depends only on `epoch`, counted from 0, the seed and the index of the image.

    Args:
        parts: Indices of the images of each batch, int64, (B,), on the CPU.

    Yields:
        Images, float32, normalised, (B, 3, H, W), in the memory format of training; labels, int64, (B,).
    """
    if images.train.pixels is None:
        seed = partial(mix_seeds, config.seed, epoch)
        order = [part.tolist() for part in parts]
        batches = images.train.batches(order, config.workers, seed, pin_memory=device.type == "cuda")
    else:
        batches = _gathered(config, images, epoch, parts)
    for inputs, labels in batches:
        inputs, labels = to_device(inputs, device), to_device(labels, device)
        if inputs.dtype == torch.uint8:
            inputs = normalize(inputs, images.data_config["mean"], images.data_config["std"])
        yield inputs.contiguous(memory_format=torch.channels_last) if config.channels_last else inputs, labels


def _gathered(
    config: TrainConfig, images: Images, epoch: int, parts: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of images, uint8, and labels from the images in memory, on their device."""
    pixels, labels = images.train.pixels, images.train.labels
    if pixels is None or not parts:
        return
    order, sizes = torch.cat([*parts]), [len(part) for part in parts]
    drawn = None if images.crop_flip is None else images.crop_flip.draw(config.seed, epoch, order)
    draws = [None] * len(sizes) if drawn is None else to_device(drawn, pixels.device).split(sizes)
    for indices, offsets in zip(to_device(order, pixels.device).split(sizes), draws, strict=True):
        batch = pixels[indices]
        yield batch if images.crop_flip is None else images.crop_flip(batch, offsets), labels[indices]
