"""Shared by all tests: no network, caches in a temporary folder, and small real data sets on disk."""

import os
import tempfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path

_cache = tempfile.TemporaryDirectory(prefix="timm-sugar-tests-")
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=_cache.name, HF_DATASETS_OFFLINE="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many processes as cores run tests; threads would only wait
os.environ.setdefault("TIMM_SUGAR_CACHE", _cache.name)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

COLOURS = {"blue": (30, 40, 200), "green": (20, 180, 60), "red": (210, 30, 40)}


def coloured_images(count: int, seed: int, size: int = 32) -> tuple[list[Image.Image], list[int]]:
    """Noisy squares of one colour each, the colour being the class, sorted by class."""
    rng = np.random.default_rng(seed)
    labels = sorted(i % len(COLOURS) for i in range(count))
    noise = rng.normal(0, 40, (count, size, size, 3))
    pixels = np.clip(np.array([*COLOURS.values()])[labels][:, None, None] + noise, 0, 255).astype(np.uint8)
    return [Image.fromarray(p) for p in pixels], labels


def image_folder(folder: Path, count: int, splits: tuple[str, ...], corrupt: Collection[tuple[str, int]] = ()) -> str:
    """Write `count` coloured images for each split as a folder of PNG files; those in `corrupt` are cut short."""
    images, labels = coloured_images(count, 0)
    for split in splits:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / split / [*COLOURS][label] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            if (split, number) in corrupt:
                path.write_bytes(path.read_bytes()[:200])
    return str(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take long first: a worker takes one after the other, and the two are to end together."""
    weights = Counter()
    for item in items:
        weights[item.path] += 50 if item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: -weights[item.path])


@pytest.fixture(scope="session")
def parquet_folder(tmp_path_factory) -> str:
    """A folder as the Hub stores a data set: train and valid parquet files with image bytes and class names."""
    import datasets

    folder = tmp_path_factory.mktemp("colours")
    for split, count, seed in (("train", 240, 0), ("valid", 60, 1)):
        images, labels = coloured_images(count, seed)
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[*COLOURS])})
        dataset = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)
