"""Labelled images, decoded to 8-bit RGB when read, with errors that name the image."""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose

_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
# TIFF tags: SMinSampleValue and SMaxSampleValue, MinSampleValue and MaxSampleValue.
_RANGE_TAGS = ((340, 341), (280, 281))

_T = TypeVar("_T")


class BadImageError(ValueError):
    """An image that cannot be decoded; the message names its file or row."""


@dataclass(frozen=True)
class LabelledImages:
    """Images with class labels, decoded when read.

    Attributes:
        read: Row number of the source -> RGB image.
        rows: Row number of each image, int64, shape (N,).
        labels: Class of each image, int64, shape (N,).
        place: Row number -> location of the image, for messages.
        stored: Row number -> encoded image; None if the source holds decoded images.
        digests: SHA-256 of `content` of each image, uint8, shape (N, 32); None if not computed.
    """

    read: Callable[[int], Image.Image]
    rows: np.ndarray
    labels: np.ndarray
    place: Callable[[int], str] = "in row {}".format
    stored: Callable[[int], bytes] | None = None
    digests: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Image.Image:
        return self._named(self.read, index)

    def content(self, index: int) -> bytes:
        """Return the encoded image, or its pixels if the source holds decoded images.

        Raises:
            BadImageError: it cannot be read.
        """
        if self.stored is None:
            return self[index].tobytes()
        return self._named(self.stored, index)

    def _named(self, get: Callable[[int], _T], index: int) -> _T:
        """Return `get(row)`; errors are raised as BadImageError with the location of the image."""
        row = int(self.rows[index])
        try:
            return get(row)
        except Exception as error:  # Pillow's decoders raise many kinds: OSError, SyntaxError, struct.error, ...
            remedy = "" if is_system_error(error) else "; repair or remove it, or train with --skip-bad-images"
            raise BadImageError(f"image {self.place(row)} {why_unreadable(error)}{remedy}") from error

    def subset(self, indices: np.ndarray) -> "LabelledImages":
        """Return the images at `indices`, in that order."""
        digests = None if self.digests is None else self.digests[indices]
        return replace(self, rows=self.rows[indices], labels=self.labels[indices], digests=digests)


def why_unreadable(error: Exception) -> str:
    """Return "cannot be read: ..." or "cannot be decoded: ..." for an error of reading or decoding an image."""
    if is_system_error(error):
        return f"cannot be read: {getattr(error, 'strerror', None) or type(error).__name__}"
    unknown = isinstance(error, UnidentifiedImageError)
    reason = "it is not in a format that Pillow reads" if unknown else " ".join(str(error).split())
    return f"cannot be decoded: {reason or type(error).__name__}"


def is_system_error(error: BaseException | None) -> bool:
    """Whether reading failed because of the file system or memory, rather than the content of the image."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)


def to_rgb(stored: bytes) -> Image.Image:
    """Decode the first frame of an image file to 8-bit RGB, applying EXIF orientation and dropping transparency.

    16-bit greyscale is scaled from [0, 65535]; 32-bit integers and floats from the range given by the TIFF tags
    SMinSampleValue and SMaxSampleValue, or MinSampleValue and MaxSampleValue.

    Raises:
        ValueError: the file is empty, or the range of its pixels is unknown.
        Exception: Pillow raises many kinds for damaged files.
    """
    if not stored:
        raise ValueError("it is empty")
    with Image.open(io.BytesIO(stored)) as image:
        image.load()
        try:
            turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        except Exception:  # damaged EXIF
            turn = None
        if image.mode == "F" or image.mode.startswith("I"):
            rgb = _to_8_bits(image).convert("RGB")
        else:
            # Pillow warns about converting a palette with transparency to RGB directly.
            rgb = (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def _to_8_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # 16 bits, too
        least, largest = 0.0, 65535.0
    else:
        tags = getattr(image, "tag_v2", {})
        known = next((pair for pair in _RANGE_TAGS if pair[0] in tags and pair[1] in tags), None)
        if known is None:
            kind = "floats" if image.mode == "F" else "32-bit integers"
            raise ValueError(
                f"its pixels are {kind} of unknown range; store them as 8 or 16 bits, or set the TIFF tags "
                "SMinSampleValue and SMaxSampleValue"
            )
        least, largest = (float(np.ravel(tags[tag])[0]) for tag in known)
    pixels = np.asarray(image, np.float64)
    if not (largest > least and np.isfinite(pixels).all()):
        raise ValueError(f"its pixels are not all finite, or their range, {least:g} to {largest:g}, is empty")
    return Image.fromarray(np.clip(np.round((pixels - least) * (255 / (largest - least))), 0, 255).astype(np.uint8))


def available_cpus() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
