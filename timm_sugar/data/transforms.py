"""Transforms from images to tensors: timm's for training and evaluation, and normalisation."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from PIL import Image
from timm.data import auto_augment as policies
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms

from .._timm import replace_augmentation

ImageTransform = Callable[[Image.Image], Any]
EVALUATION = ("input_size", "interpolation", "crop_pct", "crop_mode")  # keys of a data config for `eval_transform`


def eval_transform(data_config: dict[str, Any]) -> transforms.Compose:
    """timm's evaluation transform for a data config (`timm.data.resolve_data_config`), without the normalisation.

    Returns:
        RGB image -> uint8 tensor (3, H, W). With `normalize` it is bit-identical to timm's own transform.
    """
    return create_transform(is_training=False, use_prefetcher=True, **{k: data_config[k] for k in EVALUATION})


def train_transform(
    data_config: dict[str, Any],
    crop: Literal["none", "resized", "padded"] = "none",
    hflip: float = 0.0,
    color_jitter: float | None = None,
    auto_augment: str | None = None,
    re_prob: float = 0.0,
    re_mode: Literal["const", "rand", "pixel"] = "pixel",
    re_count: int = 1,
) -> transforms.Compose:
    """timm's training transform. It draws from the global generators of Python, NumPy and torch.

    Args:
        data_config: input_size, interpolation, mean, std; for crop "none" also crop_pct and crop_mode.
        crop: "none", as in evaluation; "resized", timm's random resized crop; "padded", a random crop after 4 pixels
            of padding on each side, as is usual at 32 px.
        hflip: Probability of a horizontal flip.
        color_jitter: Strength; as in timm, it has no effect together with `auto_augment`.
        auto_augment: timm's policy string.
        re_prob, re_mode, re_count: Options of random erasing.

    Returns:
        RGB image -> normalised float32 tensor (3, H, W).

    Raises:
        ValueError: timm does not know the policy.
    """
    jitter: Any = color_jitter  # timm accepts None too, unlike its annotation
    try:
        compose = create_transform(
            is_training=True,
            hflip=hflip,
            color_jitter=jitter,
            auto_augment=auto_augment,
            re_prob=re_prob,
            re_mode=re_mode,
            re_count=re_count,
            **{k: data_config[k] for k in ("input_size", "interpolation", "mean", "std")},
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"auto_augment {auto_augment!r} is not a policy that timm knows") from error
    replace_augmentation(compose.transforms, policies.posterize, _posterize)
    if crop != "resized":
        # The evaluation transform without its conversion to an array: resize, crop to size.
        resize = eval_transform(data_config if crop == "none" else data_config | {"crop_pct": 1.0}).transforms[:-1]
        side = data_config["input_size"][-1]
        compose.transforms[:1] = resize if crop == "none" else [*resize, transforms.RandomCrop(side, padding=4)]
    return compose


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    # timm's strongest level keeps 0 bits, a black image, which is an error since Pillow 13.
    kept: Image.Image = policies.posterize(image, max(1, bits), **kwargs)
    return kept


def channel_counts(pixels: Tensor) -> Tensor:
    """Return the histogram of each channel of uint8 pixels (N, C, H, W), int64 (C, 256)."""
    counts = torch.zeros(pixels.shape[1], 256, dtype=torch.int64)
    for part in pixels.split(4096):
        counts += torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in part.unbind(1)])
    return counts


def channel_statistics(counts: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, for pixels in [0, 1], to 4 digits.

    Args:
        counts: Result of `channel_counts`.
    """
    weights = counts.double()
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (weights * values).sum(1) / weights.sum(1)
    std = ((weights * (values - mean[:, None]) ** 2).sum(1) / weights.sum(1)).sqrt()
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(max(v, 1e-4), 4) for v in std.tolist())


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale uint8 pixels (N, C, H, W) to [0, 1], subtract `mean` and divide by `std` of each channel; float32."""
    mean_tensor, std_tensor = _constants((*mean, *std), pixels.device)
    return pixels.float().div_(255).sub_(mean_tensor).div_(std_tensor)


@lru_cache(maxsize=64)
def _constants(mean_and_std: tuple[float, ...], device: torch.device) -> list[Tensor]:
    """Return mean and standard deviation on the device, (1, C, 1, 1), cached, since a copy would synchronise."""
    with torch.inference_mode(False):
        return [part.view(1, -1, 1, 1) for part in torch.tensor(mean_and_std, device=device).chunk(2)]
