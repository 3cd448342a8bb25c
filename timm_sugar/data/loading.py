"""Batches in a given order, of images decoded once into memory, or decoded on demand by workers."""

import hashlib
import os
import platform
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torchvision
from PIL import features
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .cache import ArrayCache
from .images import BadImageError, LabelledImages, available_cpus
from .parallel import compute_rows
from .sources import Source
from .transforms import EVALUATION, ImageTransform, eval_transform


def decode(images: LabelledImages, transform: ImageTransform, title: str | None = None) -> Tensor:
    """Decode and transform every image, once.

    Args:
        images: At least one.
        transform: RGB image -> array or tensor (3, H, W).
        title: Title of the progress bar; None for no bar.

    Returns:
        uint8 tensor (N, 3, H, W).

    Raises:
        BadImageError: an image cannot be decoded; the message names its file or row.
    """
    shape = (len(images), *transform(images[0]).shape)
    return torch.from_numpy(compute_rows(lambda index: transform(images[index]), shape, title))


def decode_kept(
    images: LabelledImages, data_config: dict[str, Any], cache: ArrayCache, title: str | None = None
) -> Tensor:
    """Decode every image as for evaluation, or take the array from the cache.

    Returns:
        uint8 tensor (N, 3, H, W) of the data config's input_size, as `eval_transform` gives it, private to this
        process.

    Raises:
        BadImageError: as for `decode`.
    """
    transform = eval_transform(data_config)
    key = content_key(images, "pixels", *(data_config[name] for name in EVALUATION))
    shape = (len(images), *data_config["input_size"])
    return torch.from_numpy(cache.array(key, shape, lambda: decode(images, transform, title).numpy()))


def content_key(images: LabelledImages, *what: object) -> str | None:
    """Return a cache key for a result computed from images: their ordered content, the decoding code, and `what`.

    It is None if their `digests` are not known, or if they are not encoded.
    """
    if images.stored is None or images.digests is None:
        return None
    return repr((hashlib.sha256(images.digests.tobytes()).hexdigest(), _decoder(), *what))


@lru_cache
def _decoder() -> tuple[str, ...]:
    codecs = [features.version(name) for name in ("jpg", "jpg_2000", "libjpeg_turbo", "libtiff", "webp", "avif")]
    code = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("images.py", "transforms.py"))
    modules = (PIL, timm, torchvision)
    return hashlib.sha256(code).hexdigest(), platform.machine(), *(str(m.__version__) for m in modules), repr(codecs)


def with_digests(source: Source) -> Source:
    """Return a source with the digests of its images, which `fingerprint` and `decode_kept` use as identity.

    Images are hashed by content instead of size and modification time, because a run may resume on another machine
    with a copy of the data. This reads the data once, like an epoch; decoding takes much longer than hashing.

    Raises:
        BadImageError: an image cannot be read.
    """

    def hashed(images: LabelledImages) -> LabelledImages:
        def digest(index: int) -> np.ndarray:
            return np.frombuffer(hashlib.sha256(images.content(index)).digest(), np.uint8)

        return replace(images, digests=compute_rows(digest, (len(images), 32)))

    return replace(source, train=hashed(source.train), test=hashed(source.test))


def fingerprint(source: Source) -> dict[str, int | str]:
    """Return counts and hashes that identify the classes, labels and images of a data set.

    Args:
        source: A result of `with_digests`; otherwise the images are read.

    Returns:
        "train_images", "test_images" and "classes" (numbers); "class_names", "labels" and "images" (the first 16
        hexadecimal digits of SHA-256). Independent of file names and of the number of images per file.

    Raises:
        BadImageError: an image cannot be read.
    """
    splits = (source.train, source.test)
    if any(images.digests is None for images in splits):
        return fingerprint(with_digests(source))
    hashed = {
        "class_names": "\0".join(source.class_names).encode(),
        "labels": b"".join(images.labels.astype("<i8").tobytes() for images in splits),
        "images": b"".join(images.digests.tobytes() for images in splits if images.digests is not None),
    }
    return {
        "train_images": len(source.train),
        "test_images": len(source.test),
        "classes": len(source.class_names),
        **{name: hashlib.sha256(content).hexdigest()[:16] for name, content in hashed.items()},
    }


@dataclass
class Split:
    """The images of one split, from which batches are taken.

    Attributes:
        labels: Class of each image, int64, (N,).
        pixels: The transformed images, uint8, (N, 3, H, W), if they are held in memory.
        images: The same images undecoded.
        transform: RGB image -> array or tensor (3, H, W).
    """

    labels: Tensor
    pixels: Tensor | None
    images: LabelledImages
    transform: ImageTransform

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self,
        order: Sequence[Sequence[int] | Tensor],
        workers: int = 0,
        seed: Callable[[int], int] | None = None,
        pin_memory: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches as tensors (B, 3, H, W) and labels (B,).

        Args:
            order: The indices of each batch; pass tensors on the device of the images to avoid a synchronisation.
            workers: Processes that decode images which are not in memory; the batches do not depend on it.
            seed: Index -> seed of the random transform of that image.
            pin_memory: Copy batches into pinned memory.

        Raises:
            BadImageError: an image cannot be decoded; the message names its file or row.
        """
        if self.pixels is not None:
            for indices in order:
                yield self.pixels[indices], self.labels[indices]
            return
        loader: DataLoader[Any] = DataLoader(
            _Batches(self, seed),
            batch_size=None,  # an item of the dataset is a batch
            sampler=[[int(index) for index in indices] for indices in order],
            num_workers=min(workers, available_cpus()),
            multiprocessing_context="fork" if workers else None,  # the functions that read images cannot be pickled
            worker_init_fn=partial(_begin_worker, os.getpid()),
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else it draws from the global generator
        )
        for batch in loader:
            if isinstance(batch, BadImageError):
                raise batch
            pixels, labels = batch
            yield pixels, labels


@dataclass
class _Batches(Dataset[Any]):
    """Dataset for DataLoader's workers: the batch of given indices, or the error of one of its images."""

    split: Split
    seed: Callable[[int], int] | None

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor] | BadImageError:
        images = []
        for index in indices:
            if self.seed is not None:
                seed_everything(self.seed(index))
            try:
                images.append(torch.as_tensor(self.split.transform(self.split.images[index])))
            except BadImageError as error:
                return error  # DataLoader would turn a raised exception into text with a traceback
        # A process may have no share of the last images.
        pixels = torch.stack(images) if images else torch.empty(0, dtype=torch.uint8)
        return pixels, self.split.labels[indices]


def seed_everything(seed: int) -> None:
    """Seed the global generators that transforms and Mixup use: Python's, NumPy's and torch's on the CPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def _begin_worker(parent: int, worker: int) -> None:
    # If the training process was killed before this point, torch would watch the new parent of the orphan instead.
    if os.getppid() != parent:
        os._exit(1)
    # Ctrl-C and a scheduler's SIGTERM reach the workers too; the training process saves first, then ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
