"""Where labelled images come from: scikit-learn's digits, data sets of the Hub and local folders, and their splits."""

import importlib.util
import io
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..surrogates import unknown_name

NAMES = {
    "digits": "scikit-learn",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
}
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_HELD_OUT = ("test", "validation", "valid", "val")


class BadImageError(ValueError):
    """An image that cannot be decoded; the message names its row."""


@dataclass(frozen=True)
class LabelledImages:
    """Images with class labels, decoded when read.

    Attributes:
        read: Row number of the source -> RGB image.
        rows: Row number of each image, int64, shape (N,).
        labels: Class of each image, int64, shape (N,).
    """

    read: Callable[[int], Image.Image]
    rows: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Image.Image:
        row = int(self.rows[index])
        try:
            return self.read(row)
        except Exception as error:  # Pillow's decoders raise many kinds: OSError, SyntaxError, struct.error, ...
            raise BadImageError(f"image in row {row} cannot be decoded: {error or type(error).__name__}") from error

    def subset(self, indices: np.ndarray) -> "LabelledImages":
        """Return the images at `indices`, in that order."""
        return LabelledImages(self.read, self.rows[indices], self.labels[indices])


@dataclass(frozen=True)
class Source:
    """A data set: the images to train on, those held out for the final test, and the names of the classes."""

    name: str
    train: LabelledImages
    test: LabelledImages
    class_names: tuple[str, ...]


def load_source(data: str, label_column: str | None = None, split_seed: int = 0, streaming: bool = False) -> Source:
    """Load a data set by name, Hub id or folder.

    Args:
        data: "digits", "cifar10", "cifar100", "tiny-imagenet", a Hub data set id such as "uoft-cs/cifar10", or a
            local folder: what `datasets.load_dataset` reads (parquet as the Hub stores it, an image folder), or the
            original tiny-imagenet-200 layout.
        label_column: Column of the class labels; None takes label, labels or fine_label.
        split_seed: Where the source has no held-out images of its own (digits), a stratified 20% is held out by it.
        streaming: Read the files once, as stored, into memory, instead of through a copy in the cache on disk. Splits,
            order and images are the same.

    Raises:
        ValueError: the name is unknown, or there is no label column, image column or held-out split.
        FileNotFoundError: the folder does not exist, or holds no images.
        ModuleNotFoundError: the extra "train" is not installed.
    """
    if data == "digits":
        return _load_digits(split_seed)
    folder = Path(data)
    if (folder / "val" / "val_annotations.txt").is_file():
        return _load_tiny_imagenet(folder)
    _require("datasets")
    if folder.is_dir():
        return _load_columns(str(folder), data, label_column, streaming)
    if data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise FileNotFoundError(f"data folder {data!r} does not exist")
    if data not in NAMES and not re.fullmatch(r"[\w.-]+/[\w.-]+", data):
        raise ValueError(f"{unknown_name('data set', data, [*NAMES])} (or give ORG/NAME of the Hub, or a folder)")
    return _load_columns(NAMES.get(data, data), data, label_column, streaming)


def split_validation(images: LabelledImages, fraction: float, split_seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Split a stratified `fraction` off for validation; the same one for the same `split_seed`."""
    held_out = stratified_sample(images.labels, round(fraction * len(images)), split_seed)
    rest = np.setdiff1d(np.arange(len(images)), held_out)
    return images.subset(rest), images.subset(held_out)


def stratified_sample(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw `count` indices with every class in proportion, to within one image, whatever order the labels are in.

    Returns:
        Sorted indices into `labels`, int64, shape (min(count, len(labels)),).
    """
    rng = np.random.default_rng(seed)
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        # Spaced evenly over [0, 1) at a random offset: any prefix of the sorted ranks is stratified.
        rank[rng.permutation(members)] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.sort(np.argsort(rank, kind="stable")[:count])


def _load_digits(split_seed: int) -> Source:
    _require("sklearn", "scikit-learn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    images = LabelledImages(lambda row: Image.fromarray(pixels[row]).convert("RGB"), np.arange(len(labels)), labels)
    train, test = split_validation(images, 0.2, split_seed)
    return Source("digits", train, test, tuple(str(name) for name in digits.target_names))


def _load_tiny_imagenet(folder: Path) -> Source:
    """Read the layout of the original archive: train/WNID/images/*.JPEG and val/images with val_annotations.txt."""
    names = sorted(path.name for path in (folder / "train").glob("*") if path.is_dir())
    class_of = {name: label for label, name in enumerate(names)}
    train = [(path, class_of[name]) for name in names for path in sorted((folder / "train" / name).glob("images/*"))]
    test = []
    for line in (folder / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines():
        file, name = line.split("\t")[:2]
        if name not in class_of:
            raise ValueError(f"data folder {str(folder)!r}: val_annotations.txt names {name}, which is not in train")
        test.append((folder / "val" / "images" / file, class_of[name]))
    if not train or not test:
        raise FileNotFoundError(f"data folder {str(folder)!r} has no images in train/WNID/images or val/images")
    return Source(str(folder), _from_files(train), _from_files(test), tuple(names))


def _from_files(files: Sequence[tuple[Path, int]]) -> LabelledImages:
    paths = [path for path, _ in files]
    return LabelledImages(
        lambda row: _to_rgb(paths[row]), np.arange(len(paths)), np.array([label for _, label in files], np.int64)
    )


def _load_columns(location: str, data: str, label_column: str | None, streaming: bool) -> Source:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        splits = datasets.load_dataset(location, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        kind = "folder" if Path(location).is_dir() else "Hub data set"
        raise FileNotFoundError(f"cannot load {kind} {data!r}: {reason}") from error
    if "train" not in splits:
        raise ValueError(f"data set {data!r} has no split named train; it has {', '.join(splits)}")
    features = splits["train"].features or splits["train"]._resolve_features().features
    label_column = _find_label_column(data, features, label_column)
    dtype = getattr(features[label_column], "dtype", type(features[label_column]).__name__)
    if "int" not in dtype:
        raise ValueError(
            f"data set {data!r}: label column {label_column!r} must hold class labels or whole numbers from 0, "
            f"not {dtype}"
        )
    image_column = next((name for name, f in features.items() if isinstance(f, datasets.Image)), None)
    if image_column is None:
        raise ValueError(f"data set {data!r} has no image column; it has {', '.join(features)}")
    read_split = _stream_split if streaming else _read_split
    read = {"train": read_split(splits["train"], image_column, label_column)}
    for name in _HELD_OUT:
        if name in splits:
            read["test"] = read_split(splits[name], image_column, label_column)
            if read["test"].labels.min() >= 0:
                break
    else:
        raise ValueError(
            f"data set {data!r} has no labelled split named {', '.join(_HELD_OUT[:-1])} or {_HELD_OUT[-1]}; "
            f"it has {', '.join(splits)}"
        )
    found = np.unique(np.concatenate([images.labels for images in read.values()]))
    feature = features[label_column]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else [str(label) for label in found]
    if not np.isin(found, np.arange(len(names))).all():
        raise ValueError(
            f"data set {data!r}: labels in column {label_column!r} must be class labels or the integers "
            f"0 to {len(names) - 1}"
        )
    return Source(data, read["train"], read["test"], tuple(names))


def _find_label_column(data: str, columns: Sequence[str], wanted: str | None) -> str:
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise ValueError(f"data set {data!r}: " + unknown_name("label column", wanted, list(columns)))
    for name in _LABEL_COLUMNS:
        if name in columns:
            return name
    raise ValueError(
        f"data set {data!r} has no column {', '.join(_LABEL_COLUMNS[:-1])} or {_LABEL_COLUMNS[-1]}; "
        f"name its label column with --label-column, one of {', '.join(columns)}"
    )


def _read_split(split: Any, image_column: str, label_column: str) -> LabelledImages:
    table = split.with_format("arrow")[:]  # other formats would decode every image
    encoded, labels = table[image_column], table[label_column].to_numpy()
    return LabelledImages(lambda row: _decode(encoded[row].as_py()), np.arange(len(labels)), _class_labels(labels))


def _stream_split(split: Any, image_column: str, label_column: str) -> LabelledImages:
    import datasets

    encoded, labels = [], []
    for row in split.cast_column(image_column, datasets.Image(decode=False)):
        encoded.append(row[image_column])
        labels.append(row[label_column])
    return LabelledImages(lambda row: _decode(encoded[row]), np.arange(len(labels)), _class_labels(np.asarray(labels)))


def _class_labels(labels: np.ndarray) -> np.ndarray:
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be class labels or whole numbers from 0, got {labels.dtype}")
    return labels.astype(np.int64)


def _decode(item: dict[str, Any]) -> Image.Image:
    return _to_rgb(io.BytesIO(item["bytes"]) if item["bytes"] is not None else item["path"])


def _to_rgb(file: Any) -> Image.Image:
    with Image.open(file) as image:
        # Pillow warns where transparency is converted to RGB at once.
        rgb: Image.Image = (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    return rgb


def _require(module: str, package: str | None = None) -> None:
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(
            f"{package or module} is not installed; it comes with the extra: pip install 'timm-sugar[train]'"
        )
