"""Crops and flips of whole batches are those that the transform of a single image makes."""

import numpy as np
import pytest
import torch
from PIL import Image

from timm_sugar.data import CropFlip, eval_transform, normalize, seed_everything, train_transform
from timm_sugar.training.images import mix_seeds

STATISTICS = dict(mean=(0.49, 0.48, 0.44), std=(0.24, 0.25, 0.26))
CONFIG = dict(input_size=(3, 32, 32), interpolation="bicubic", crop_pct=0.9, crop_mode="center") | STATISTICS
IMAGES = [Image.fromarray(p) for p in np.random.default_rng(0).integers(0, 256, (60, 32, 40, 3), np.uint8)]


@pytest.mark.parametrize(("seed", "epoch"), [(42, 0), (2**32 - 1, 7), (0, 999_999)])
@pytest.mark.parametrize("hflip", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("crop", "padding"), [("padded", 4), ("none", 0)])
def test_the_same_to_the_bit(crop, padding, hflip, seed, epoch):
    transform = train_transform(CONFIG, crop=crop, hflip=hflip)
    wanted = []
    for index, image in enumerate(IMAGES):
        seed_everything(mix_seeds(seed, epoch, index))
        wanted.append(transform(image))
    whole = eval_transform(CONFIG | {"crop_pct": 1.0} if crop == "padded" else CONFIG)
    pixels = torch.stack([torch.as_tensor(whole(image)) for image in IMAGES])
    order, crop_flip = torch.randperm(60, generator=torch.Generator().manual_seed(1)), CropFlip(padding, hflip)
    found = normalize(crop_flip(pixels[order], crop_flip.draw(seed, epoch, order)), **STATISTICS)
    assert torch.equal(found, torch.stack(wanted)[order])


def test_draws_are_as_likely_as_they_should_be():
    top, left, flip = CropFlip(4, 0.25).draw(1, 2, torch.arange(90_000)).unbind(1)
    for offset in (top, left):
        assert torch.bincount(offset, minlength=9).tolist() == pytest.approx([10_000] * 9, abs=400)  # 4 deviations
    assert flip.sum().item() == pytest.approx(22_500, abs=520)
