"""Batches: the same whether images are in memory or decoded by workers, and whatever the number of workers."""

import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.conftest import image_folder
from timm_sugar.data import (
    BadImageError,
    LabelledImages,
    Split,
    decode,
    eval_transform,
    fingerprint,
    load_source,
    train_transform,
    with_digests,
)

DATA_CONFIG = dict(
    input_size=(3, 24, 24), interpolation="bicubic", crop_pct=1.0, crop_mode="center",
    mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
)  # fmt: skip
ORDER = [[5, 0, 7], [100, 3], []]


def _split(folder, transform, held=False):
    images = load_source(folder).train
    pixels = decode(images, transform) if held else None
    return Split(torch.from_numpy(images.labels), pixels, images, transform)


@pytest.mark.parametrize("workers", [0, 2])
def test_decoded_as_needed_as_in_memory(parquet_folder, workers):
    transform = eval_transform(DATA_CONFIG)
    held = list(_split(parquet_folder, transform, held=True).batches(ORDER))
    needed = list(_split(parquet_folder, transform).batches(ORDER, workers=workers))
    assert [len(labels) for _, labels in held] == [3, 2, 0]
    for (pixels, labels), (others, other_labels) in zip(held, needed, strict=True):
        assert torch.equal(labels, other_labels)
        assert not len(labels) or torch.equal(pixels, others)


def test_augmentation_does_not_depend_on_workers_or_order(parquet_folder):
    split = _split(parquet_folder, train_transform(DATA_CONFIG, crop="resized", auto_augment="rand-m9-mstd0.5-inc1"))
    seed = partial(lambda epoch, index: 1000 * epoch + index, 3)
    drawn = [torch.cat([x for x, _ in split.batches(ORDER[:2], workers, seed)]) for workers in (0, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    ((again, _),) = split.batches([[3, 7]], 0, seed)
    assert torch.equal(again, drawn[0][[4, 2]])
    ((other, _),) = split.batches([[3, 7]], 0, partial(lambda epoch, index: 1000 * epoch + index, 4))
    assert not torch.equal(again, other)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_in_one_line(workers):
    def read(row):
        raise OSError("image file is truncated")

    images = LabelledImages(read, np.array([41]), np.array([0]))
    split = Split(torch.zeros(1, dtype=torch.int64), None, images, np.asarray)
    with pytest.raises(BadImageError) as caught:
        list(split.batches([[0]], workers))
    assert str(caught.value) == (
        "image in row 41 cannot be decoded: image file is truncated; "
        "repair or remove it, or train with --skip-bad-images"
    )


def _invert(path):
    ImageOps.invert(Image.open(path)).save(path, compress_level=0)


def _invert_unseen(path):
    """Another image in a file of the same size and time."""
    Image.open(path).save(path, compress_level=0)
    before, content = os.stat(path), path.read_bytes()
    _invert(path)
    assert len(path.read_bytes()) == len(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CLASSES = {"class_names", "classes"}


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda f: _invert(f / "train/red/10.png"), {"images"}),
        (lambda f: _invert_unseen(f / "test/blue/00.png"), {"images"}),
        (lambda f: (f / "train/red/10.png").unlink(), {"images", "train_images", "labels"}),
        (lambda f: shutil.copy(f / "test/red/10.png", f / "test/red/99.png"), {"images", "test_images", "labels"}),
        (lambda f: (f / "train/red/10.png").rename(f / "train/blue/10.png"), {"images", "labels"}),
        (lambda f: [(f / s / "red").rename(f / s / "scarlet") for s in ("train", "test")], {"class_names"}),
        (lambda f: shutil.copytree(f / "train/red", f / "train/pink"), {"images", "train_images", "labels"} | CLASSES),
    ],
    ids=["replaced", "replaced in size and time", "removed", "added", "moved", "class renamed", "class added"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:data set .* has no test image")
def test_the_fingerprint_is_that_of_the_content(tmp_path, change, changed):
    folder = tmp_path / "a"
    image_folder(folder, 12, ("train", "test"))
    before = fingerprint(load_source(str(folder)))
    assert (before["train_images"], before["test_images"], before["classes"]) == (12, 12, 3)
    shutil.copytree(folder, tmp_path / "b", copy_function=shutil.copyfile)  # with other times
    assert fingerprint(load_source(str(tmp_path / "b"))) == before
    change(folder)
    after = fingerprint(load_source(str(folder)))
    assert {name for name in before if before[name] != after[name]} == changed


def test_the_fingerprint_does_not_depend_on_how_a_file_is_read(parquet_folder):
    streamed = fingerprint(load_source(parquet_folder, streaming=True))
    assert fingerprint(with_digests(load_source(parquet_folder))) == streamed
    digits = fingerprint(load_source("digits"))
    assert (digits["train_images"], digits["test_images"], digits["classes"]) == (1438, 359, 10)
    assert digits == fingerprint(load_source("digits"))
    assert digits != fingerprint(load_source("digits", split_seed=1))
