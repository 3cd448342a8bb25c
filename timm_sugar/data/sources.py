"""Sources of labelled images: scikit-learn's digits, Hub data sets and local folders, and their splits."""

import bisect
import glob
import hashlib
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..surrogates import unknown_name
from .folders import (
    HELD_OUT,
    files_below,
    images_by_class,
    is_image_name,
    listed,
    parquet_by_split,
    split_folders,
    split_of,
)
from .images import LabelledImages, to_rgb
from .parallel import readable

NAMES = {
    "digits": "scikit-learn",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
}
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_IMAGE_COLUMNS = ("image", "img")


@dataclass(frozen=True)
class Source:
    """A data set: training images, held-out test images and the names of the classes.

    Attributes:
        bad_images: Number of images left out because they cannot be decoded.
    """

    name: str
    train: LabelledImages
    test: LabelledImages
    class_names: tuple[str, ...]
    bad_images: int = 0


def load_source(
    data: str,
    label_column: str | None = None,
    split_seed: int = 0,
    streaming: bool = False,
    image_column: str | None = None,
    skip_bad_images: bool = False,
) -> Source:
    """Load a data set by name, Hub id or folder.

    Args:
        data: "digits", "cifar10", "cifar100", "tiny-imagenet", a Hub data set id such as "uoft-cs/cifar10", or a
            local folder: images as SPLIT/CLASS/any depth, parquet files as the Hub stores them, the original
            tiny-imagenet-200 layout, or anything else that `datasets.load_dataset` reads.
        label_column: Column of the class labels; None takes label, labels or fine_label.
        split_seed: Seed of the stratified 20% that is held out if the source has no test split (digits).
        streaming: Read the files once, as stored, into memory, without a copy in the disk cache. Splits, order and
            images are the same.
        image_column: Column of the images; None takes image, img, or the only column that holds images.
        skip_bad_images: Decode every image once and exclude those that cannot be decoded.

    The test images are those of the test split, or of the validation split if there is no labelled test split.
    Labels are matched by class name, even if files number the classes differently. A warning names classes without
    training images or without test images.

    Raises:
        ValueError: the name is unknown; a label column, image column, test split or label is missing; a test class
            does not occur in training; `skip_bad_images` leaves no test image or no training image of a class.
        FileNotFoundError: the folder does not exist, or holds no images.
        ModuleNotFoundError: the extra "train" is not installed.

    Examples:
        >>> source = load_source("digits")
        >>> len(source.train), len(source.test), source.class_names[:3]
        (1438, 359, ('0', '1', '2'))
        >>> source.train[0].mode, source.train[0].size, int(source.train.labels[0])
        ('RGB', (8, 8), 0)
    """
    source = _load(data, label_column, split_seed, streaming, image_column)
    return _without_bad_images(source) if skip_bad_images else source


def _load(data: str, label_column: str | None, split_seed: int, streaming: bool, image_column: str | None) -> Source:
    if data == "digits":
        return _load_digits(split_seed)
    folder = Path(data)
    if (folder / "val" / "val_annotations.txt").is_file():
        return _load_tiny_imagenet(folder)
    if folder.is_dir():
        return replace(_load_folder(folder, label_column, image_column, streaming), name=data)
    if data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise FileNotFoundError(f"data folder {data!r} does not exist")
    if data not in NAMES and not re.fullmatch(r"[\w.-]+/[\w.-]+", data):
        raise ValueError(f"{unknown_name('data set', data, [*NAMES])} (or give ORG/NAME of the Hub, or a folder)")
    return _load_columns(data, label_column, image_column, streaming, path=NAMES.get(data, data))


def _without_bad_images(source: Source) -> Source:
    train, test = (images.subset(readable(images, "looking for bad images")) for images in (source.train, source.test))
    for name, found, kept in (("training", source.train, train), ("test", source.test, test)):
        if not len(kept):
            raise ValueError(f"data set {source.name!r}: none of the {len(found)} {name} images can be decoded")
    lost = np.setdiff1d(source.train.labels, train.labels)
    if len(lost):
        names = listed([source.class_names[label] for label in lost])
        raise ValueError(f"data set {source.name!r}: no training image of class {names} can be decoded")
    bad = len(source.train) + len(source.test) - len(train) - len(test)
    return replace(source, train=train, test=test, bad_images=bad)


def split_validation(images: LabelledImages, fraction: float, split_seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Split off a stratified `fraction` for validation, determined by `split_seed`.

    Raises:
        ValueError: a class would have no training image left.
    """
    held_out = stratified_sample(images.labels, round(fraction * len(images)), split_seed)
    rest = np.setdiff1d(np.arange(len(images)), held_out)
    lost = held_out[~np.isin(images.labels[held_out], images.labels[rest])]
    if len(lost):
        raise ValueError(
            f"a validation split of {fraction:g} takes every training image of {len(np.unique(images.labels[lost]))} "
            f"classes, for example the image {images.place(int(images.rows[lost[0]]))}; add images to these classes or "
            "use a smaller --val-fraction, or 0"
        )
    return images.subset(rest), images.subset(held_out)


def stratified_sample(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw `count` indices with every class in proportion, to within one image, for any order of the labels.

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
    """Read the original archive's layout: train/WNID/images/*.JPEG and val/images with val_annotations.txt."""
    train = [
        (path, Path(path).parts[-3])
        for path in files_below(folder / "train")
        if is_image_name(path) and Path(path).parts[-2] == "images"
    ]
    test, annotations = [], folder / "val" / "val_annotations.txt"
    for number, line in enumerate(annotations.read_text(encoding="utf-8").splitlines(), 1):
        file, _, rest = line.partition("\t")
        if not rest:
            raise ValueError(f"{annotations}, line {number}: expected a file and a class, got {line!r}")
        test.append((str(folder / "val" / "images" / file), rest.split("\t")[0]))
    if not train or not test:
        raise FileNotFoundError(f"data folder {str(folder)!r} has no images in train/WNID/images or val/images")
    return _join(str(folder), _from_files(train), _from_files(test))


def _load_folder(folder: Path, label_column: str | None, image_column: str | None, streaming: bool) -> Source:
    data, files = str(folder), files_below(folder)
    if not files:
        raise FileNotFoundError(
            f"data folder {data!r} holds no files; images belong in train/CLASS and test/CLASS, parquet files are "
            "named train-*.parquet and test-*.parquet"
        )
    parquet = parquet_by_split(folder, files)
    if parquet:
        return _load_parquet(data, parquet, label_column, image_column, streaming)
    splits = split_folders(folder)
    has_images = any(map(is_image_name, files))
    if "train" not in splits:
        if has_images:
            raise FileNotFoundError(f"data folder {data!r} has images but no folder train; they belong in train/CLASS")
        return _load_columns(data, label_column, image_column, streaming, path=data)
    metadata = {os.path.join(splits["train"], f"metadata.{kind}") for kind in ("csv", "jsonl", "parquet")}
    if has_images and metadata.isdisjoint(files):  # else labels are in the metadata file
        return _load_images(data, {name: images_by_class(path, files) for name, path in splits.items()})
    # Without patterns, datasets infers splits from every name in a path, class names included.
    patterns = {name: f"{glob.escape(path)}/**" for name, path in splits.items()}
    return _load_columns(data, label_column, image_column, streaming, path=data, data_files=patterns)


def _load_images(data: str, splits: dict[str, list[tuple[str, str | None]]]) -> Source:
    held_out = [name for name in HELD_OUT if any(label is not None for _, label in splits.get(name, ()))]
    if not held_out:
        raise FileNotFoundError(f"data folder {data!r} has no test images in class folders, test/CLASS or val/CLASS")
    labelled = []
    for files in (splits["train"], splits[held_out[0]]):
        loose = next((path for path, label in files if label is None), None)
        if loose is not None:
            raise ValueError(f"image {loose} is not in a class folder; it belongs in {Path(loose).parent}/CLASS")
        labelled.append(_from_files([(path, label) for path, label in files if label is not None]))
    return _join(data, *labelled)


@dataclass(frozen=True)
class _Labels:
    """Labels of one file.

    Attributes:
        classes: Name of the class of each image; None if there is no label.
        names: All class names of the file, in its order.
        kind: "names" if the file defines the order of the classes; "text" or "numbers" if they are sorted as such.
    """

    classes: Sequence[str | None]
    names: Sequence[str]
    kind: str


@dataclass(frozen=True)
class _Split:
    """Images of one split whose classes are not numbered yet; `images.labels` is a placeholder."""

    images: LabelledImages
    labels: list[_Labels]


def _join(data: str, train: _Split, test: _Split) -> Source:
    """Match the classes of both splits by name and number them."""
    kinds = {part.kind for split in (train, test) for part in split.labels if part.names}
    if "numbers" in kinds and len(kinds) > 1:
        raise ValueError(
            f"data set {data!r}: some files have class names and others have numbers without names, which cannot be "
            "matched; store the labels of all files in one way"
        )

    def classes_of(split: _Split) -> list[str]:
        found = [name for part in split.labels for name in part.classes]
        known = [name for name in found if name is not None]
        if len(known) < len(found):
            place = split.images.place(found.index(None))
            raise ValueError(f"data set {data!r}: the image {place} has no label")
        return known

    train_classes, test_classes = classes_of(train), classes_of(test)
    names = list(dict.fromkeys(name for part in train.labels for name in part.names))
    if kinds == {"numbers"}:
        names.sort(key=int)
        if names != [str(number) for number in range(len(names))]:
            raise ValueError(
                f"data set {data!r}: labels must be class labels, text or the whole numbers 0 to {len(names) - 1}, "
                f"found {listed(names)}"
            )
    elif kinds == {"text"}:
        names.sort()
    if len(names) < 2:
        found = f"one class, {names[0]!r}" if names else "no images to train on"
        raise ValueError(f"data set {data!r} has {found}; a classifier needs two classes or more")
    in_train, in_test = set(train_classes), set(test_classes)
    if not in_train & in_test:
        raise ValueError(
            f"data set {data!r}: training and test images have no class in common; "
            f"training has {listed(sorted(in_train))}, test has {listed(sorted(in_test))}"
        )
    unknown = in_test.difference(names)
    if unknown:
        raise ValueError(f"data set {data!r}: test images have classes that training lacks: {listed(sorted(unknown))}")
    for what, missing in (("training", set(names) - in_train), ("test", in_train - in_test)):
        if missing:
            warnings.warn(f"data set {data!r} has no {what} image of {listed(sorted(missing))}", stacklevel=4)
    number_of = {name: number for number, name in enumerate(names)}
    train_images, test_images = (
        replace(split.images, labels=np.array([number_of[name] for name in classes], np.int64))
        for split, classes in ((train, train_classes), (test, test_classes))
    )
    return Source(data, train_images, test_images, tuple(names))


def _from_files(files: Sequence[tuple[str, str]]) -> _Split:
    paths, classes = [path for path, _ in files], [name for _, name in files]
    images = _stored_images(len(files), lambda row: Path(paths[row]), paths.__getitem__)
    return _Split(images, [_Labels(classes, sorted(set(classes)), "text")])


def _load_parquet(
    data: str, files: dict[str, list[str]], label_column: str | None, image_column: str | None, streaming: bool
) -> Source:
    """Read parquet files, each with its own class names; `datasets` would use those of the first file for all."""
    _require("datasets")
    import datasets
    import pyarrow.parquet as parquet

    def read(path: str, columns: list[str] | None) -> Any:
        try:
            return parquet.read_schema(path) if columns is None else parquet.read_table(path, columns=columns)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {_first_line(error)}") from error

    features = {
        path: datasets.Features.from_arrow_schema(read(path, None)) for paths in files.values() for path in paths
    }
    first = files["train"][0]
    label_column, image_column = _find_columns(data, features[first], label_column, image_column)
    for path, others in features.items():
        for column in (label_column, image_column):
            if column not in others:
                raise ValueError(f"{path} has no column {column!r}, unlike {first}; it has {', '.join(others)}")

    def read_split(split: str) -> _Split:
        paths = files[split]
        labels = [
            _labels(read(path, [label_column])[label_column], features[path][label_column], path, label_column)
            for path in paths
        ]
        starts = np.cumsum([0, *(len(part.classes) for part in labels)])

        def locate(row: int) -> tuple[int, int]:
            file = bisect.bisect_right(starts, row) - 1
            return file, row - int(starts[file])

        def item(row: int) -> Any:
            file, row_of_file = locate(row)
            return columns[file][row_of_file].as_py() if streaming else columns[0][row].as_py()

        def place(row: int) -> str:
            file, row_of_file = locate(row)
            return f"in row {row_of_file} of {paths[file]}"

        if streaming:
            columns = [read(path, [image_column])[image_column] for path in paths]
        elif filled := [path for path, part in zip(paths, labels, strict=True) if part.classes]:
            loaded = _load_dataset(
                data,
                "parquet",
                # The cache of datasets identifies files by path and modification time only.
                name=hashlib.sha256(repr([os.path.getsize(path) for path in paths]).encode()).hexdigest()[:16],
                data_files={split: [glob.escape(path) for path in filled]},  # datasets fails on files without rows
                columns=[image_column],
                features=datasets.Features({image_column: datasets.Image()}),
            )
            columns = [loaded[split].with_format("arrow")[:][image_column]]
        return _Split(_stored_images(int(starts[-1]), item, place), labels)

    return _choose_test(data, files, read_split)


def _choose_test(data: str, splits: Collection[str], read: Callable[[str], _Split]) -> Source:
    """Join the training split and the first labelled held-out split."""
    for name in HELD_OUT:
        if name in splits:
            test = read(name)
            if any(name is not None for part in test.labels for name in part.classes):
                return _join(data, read("train"), test)
    raise ValueError(
        f"data set {data!r} has no labelled split named {', '.join(HELD_OUT[:-1])} or {HELD_OUT[-1]}; "
        f"it has {', '.join(splits)}"
    )


def _load_columns(
    data: str, label_column: str | None, image_column: str | None, streaming: bool, **arguments: Any
) -> Source:
    _require("datasets")
    import pyarrow

    splits = _load_dataset(data, streaming=streaming, **arguments)
    if "train" not in splits:
        raise ValueError(f"data set {data!r} has no split named train; it has {', '.join(splits)}")
    features = splits["train"].features or splits["train"]._resolve_features().features
    label_column, image_column = _find_columns(data, features, label_column, image_column)

    def read(name: str) -> _Split:
        split = splits[name].with_format("arrow")  # other formats would decode every image
        parts = chain([features.arrow_schema.empty_table()], split.iter(1000)) if streaming else [split[:]]
        table = pyarrow.concat_tables([part.select([image_column, label_column]) for part in parts])
        column = table[image_column]
        images = _stored_images(
            len(table), lambda row: column[row].as_py(), lambda row: f"in row {row} of {name} of {data}"
        )
        return _Split(images, [_labels(table[label_column], features[label_column], data, label_column)])

    return _choose_test(data, splits, read)


def _load_dataset(data: str, path: str, streaming: bool = False, **arguments: Any) -> Any:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(path, **arguments)
        misplaced = None if Path(data).is_dir() or builder.name != "imagefolder" else _misplaced(builder)
        if misplaced is None:
            if streaming:
                return builder.as_streaming_dataset()
            builder.download_and_prepare()
            return builder.as_dataset()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        kind = "folder" if Path(data).is_dir() else "Hub data set"
        cause = f": {_first_line(error.__cause__)}" if isinstance(error.__cause__, Exception) else ""
        raise FileNotFoundError(f"cannot load {kind} {data!r}: {_first_line(error)}{cause}") from error
    raise ValueError(
        f"Hub data set {data!r}: {misplaced} is not SPLIT/CLASS/FILE, or its class is named like a split; "
        f"download it with `hf download --repo-type dataset {data} --local-dir DIR` and give --data DIR"
    )


def _misplaced(builder: Any) -> str | None:
    """Return an image file, if any, for which `datasets` infers another split or class than SPLIT/CLASS/FILE."""
    for split, files in builder.config.data_files.items():
        places = [str(file).removeprefix(f"{builder.base_path}/") for file in files]
        if any(os.path.basename(place).startswith("metadata.") for place in places):
            continue  # labels come from the metadata file
        for place in filter(is_image_name, places):
            folders = place.split("/")[:-1]
            if len(folders) < 2 or split_of(folders[-2]) != split:
                return place
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _labels(column: Any, feature: Any, file: str, name: str) -> _Labels:
    """Read a label column; null and negative numbers mean no label."""
    import datasets

    values = column.to_pylist()
    if isinstance(feature, datasets.ClassLabel):
        numbers = [-1 if value is None else value for value in values]
        if max(numbers, default=-1) >= len(feature.names):
            row = numbers.index(max(numbers))
            raise ValueError(
                f"{file}: label {numbers[row]} in row {row} has no class name; "
                f"column {name!r} names the labels 0 to {len(feature.names) - 1}"
            )
        return _Labels([feature.names[n] if n >= 0 else None for n in numbers], feature.names, "names")
    kinds = {type(value) for value in values if value is not None}
    if not kinds <= {int} and not kinds <= {str}:
        kind = getattr(feature, "dtype", None) or type(feature).__name__
        raise ValueError(
            f"{file}: label column {name!r} must hold class labels, text or whole numbers from 0, not {kind}"
        )
    if kinds == {int}:
        values = [value if value is not None and value >= 0 else None for value in values]
    found = sorted({value for value in values if value is not None})
    classes = [None if value is None else str(value) for value in values]
    return _Labels(classes, [str(value) for value in found], "text" if kinds == {str} else "numbers")


def _find_columns(data: str, features: Mapping[str, Any], label: str | None, image: str | None) -> tuple[str, str]:
    """Return the columns of labels and images: the given ones, else those with the usual names."""
    for kind, wanted in (("label", label), ("image", image)):
        if wanted is not None and wanted not in features:
            raise ValueError(f"data set {data!r}: " + unknown_name(f"{kind} column", wanted, list(features)))
    label = label or next((name for name in _LABEL_COLUMNS if name in features), None)
    if label is None:
        raise ValueError(
            f"data set {data!r} has no column {', '.join(_LABEL_COLUMNS[:-1])} or {_LABEL_COLUMNS[-1]}; "
            f"name its label column with --label-column, one of {', '.join(features)}"
        )
    found = [name for name, feature in features.items() if _holds_images(feature)]
    if image and image not in found:
        raise ValueError(f"data set {data!r}: column {image!r} holds {features[image]}, not images")
    if not found:
        shown = ", ".join(f"{name} ({getattr(feature, 'dtype', feature)})" for name, feature in features.items())
        raise ValueError(f"data set {data!r} has no column of images, or of bytes of image files; it has {shown}")
    usual = found if len(found) == 1 else [name for name in _IMAGE_COLUMNS if name in found]
    if not image and not usual:
        raise ValueError(
            f"data set {data!r} has several image columns; name one with --image-column: {', '.join(found)}"
        )
    return label, image or usual[0]


def _holds_images(feature: Any) -> bool:
    """Whether a column holds images, or stored images: bytes, or a struct of bytes and path."""
    import datasets

    if isinstance(feature, dict):
        return feature.keys() == {"bytes", "path"}
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _stored_images(count: int, item: Callable[[int], Any], place: Callable[[int], str]) -> LabelledImages:
    """Return images stored as bytes, in files, or as `datasets` stores them, in a dict with bytes or a path."""

    def stored(row: int) -> bytes:
        found = item(row)
        if isinstance(found, dict):
            found = found["bytes"] if found["bytes"] is not None or not found["path"] else Path(found["path"])
        if found is None:
            raise ValueError("it is null")
        content: bytes = found.read_bytes() if isinstance(found, Path) else found
        return content

    rows = np.arange(count)
    return LabelledImages(lambda row: to_rgb(stored(row)), rows, rows, place, stored)


def _require(module: str, package: str | None = None) -> None:
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(
            f"{package or module} is not installed; it comes with the extra: pip install 'timm-sugar[train]'"
        )
