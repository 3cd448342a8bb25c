"""Transforms: decoding once and normalising gives to the bit what timm's own evaluation transform gives."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from timm_sugar.data import (
    LabelledImages,
    channel_counts,
    channel_statistics,
    decode,
    eval_transform,
    load_source,
    normalize,
    seed_everything,
    train_transform,
)

STATISTICS = dict(mean=(0.49, 0.48, 0.44), std=(0.24, 0.25, 0.26))
PAPER = dict(color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel", re_count=1)


def _data_config(size):
    return dict(input_size=(3, size, size), interpolation="bicubic", crop_pct=1.0, crop_mode="center") | STATISTICS


@pytest.mark.parametrize("crop_pct", [1.0, 0.8])
def test_same_pixels_as_timm(parquet_folder, crop_pct):
    data_config = dict(input_size=(3, 24, 24), interpolation="bicubic", crop_pct=crop_pct, crop_mode="center")
    statistics = dict(mean=(0.49, 0.48, 0.44), std=(0.24, 0.25, 0.26))
    images = load_source(parquet_folder).train.subset(np.arange(0, 240, 40))
    ours = normalize(decode(images, eval_transform(data_config)), **statistics)
    timms = create_transform(**data_config, **statistics, is_training=False)
    assert torch.equal(ours, torch.stack([timms(images[i]) for i in range(len(images))]))


def test_decode_keeps_the_order_of_many_images(parquet_folder):
    images = load_source(parquet_folder).train.subset(np.repeat(np.arange(240), 3))
    transform = eval_transform(dict(input_size=(3, 32, 32), interpolation="bicubic", crop_pct=1.0, crop_mode="center"))
    pixels = decode(images, transform)
    assert pixels.shape == (720, 3, 32, 32)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels[::3], pixels[1::3])
    np.testing.assert_array_equal(pixels[300].permute(1, 2, 0).numpy(), np.asarray(images[300]))


def test_unreadable_image_is_named_by_its_row():
    def read(row):
        raise OSError("image file is truncated")

    images = LabelledImages(read, np.array([41]), np.array([0]))
    with pytest.raises(ValueError, match="image in row 41 cannot be decoded: image file is truncated"):
        decode(images, np.asarray)


def test_channel_statistics_are_those_of_the_pixels():
    pixels = torch.randint(0, 256, (50, 3, 9, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = channel_statistics(channel_counts(pixels))
    scaled = pixels.double() / 255
    np.testing.assert_allclose(mean, scaled.mean((0, 2, 3)), atol=5e-5)
    np.testing.assert_allclose(std, scaled.std((0, 2, 3), correction=0), atol=5e-5)
    assert channel_statistics(channel_counts(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)))[1] == (1e-4,) * 3


@pytest.mark.parametrize("crop", ["none", "resized", "padded"])
def test_training_images_are_a_function_of_the_seed(parquet_folder, crop):
    transform = train_transform(_data_config(24), crop=crop, hflip=0.5, **PAPER)
    image = load_source(parquet_folder).train[0]
    drawn = []
    for seed in (1, 2, 1):
        seed_everything(seed)
        drawn.append(transform(image))
    assert drawn[0].shape == (3, 24, 24)
    assert drawn[0].dtype == torch.float32
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_without_randomness_training_images_are_those_of_evaluation(parquet_folder):
    image = load_source(parquet_folder).train[0]
    pixels = eval_transform(_data_config(24))(image)[None]
    expected = normalize(pixels, **STATISTICS)[0]
    torch.testing.assert_close(train_transform(_data_config(24))(image), expected)


def test_padded_crops_move_by_at_most_four_pixels():
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[16, 16] = 255
    transform = train_transform(_data_config(32), crop="padded")
    seen = set()
    for seed in range(400):
        seed_everything(seed)
        found = transform(Image.fromarray(pixels))[0].flatten().argmax().item()
        seen.add(divmod(found, 32))
    assert seen == {(y, x) for y in range(12, 21) for x in range(12, 21)}


def test_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="auto_augment 'rnad-m9' is not a policy that timm knows"):
        train_transform(_data_config(32), auto_augment="rnad-m9")


@pytest.mark.slow
def test_ten_thousand_augmented_images():
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(50)]
    transform = train_transform(_data_config(8), crop="padded", hflip=0.5, **PAPER)
    seed_everything(0)
    for number in range(10_000):
        transform(images[number % len(images)])


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m5", "original-mstd0.5", "3a"])
def test_every_posterize_keeps_a_bit(policy):
    from timm.data import auto_augment
    from timm.data.auto_augment import AugmentOp

    from timm_sugar._timm import augment_ops

    transform = train_transform(_data_config(8), auto_augment=policy)
    found = [op for op in augment_ops(transform.transforms) if isinstance(op, AugmentOp)]
    assert policy == "3a" or found
    image = Image.fromarray(np.full((8, 8, 3), 200, np.uint8))
    for op in found:
        if "Posterize" in op.name:
            assert np.asarray(op.aug_fn(image, 0)).max() == 128
    assert auto_augment.NAME_TO_OP["PosterizeIncreasing"] is auto_augment.posterize  # timm itself is left alone
