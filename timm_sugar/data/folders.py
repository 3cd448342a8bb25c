"""What a local folder holds: image files as SPLIT/CLASS/any depth, or parquet files by split."""

import os
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

# Names of splits, as folders and at the beginning of parquet files' names, in capitals or not.
_SPLIT_OF = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
HELD_OUT = ("test", "validation", "valid", "val")  # in this order; the Hub has all four


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return names for a message, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def files_below(folder: Path) -> list[str]:
    """Return the paths of all files in a folder, at any depth and through symbolic links, sorted; hidden ones not.

    Raises:
        ValueError: a link leads to a folder that it lies in.
        OSError: a folder cannot be read.
    """
    return sorted(_files_below(str(folder), ()))


def _files_below(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise ValueError(f"{folder} is a link to a folder that it lies in; remove it")
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _files_below(entry.path, (*above, here))
        else:
            yield entry.path


def _visible(folder: Path | str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]


def is_image_name(path: str) -> bool:
    """Whether a file's extension is that of a format that Pillow opens."""
    extensions = Image.registered_extensions()
    return extensions.get(os.path.splitext(path)[1].lower()) in Image.OPEN


def split_of(name: str) -> str | None:
    """Return the split that a folder's name stands for: train, test or validation."""
    return _SPLIT_OF.get(name.lower())


def split_folders(folder: Path) -> dict[str, str]:
    """Return the folders of the first level that are named for a split: train, test or validation.

    Raises:
        ValueError: two of them name the same split.
    """
    found: dict[str, str] = {}
    for entry in sorted(_visible(folder), key=lambda entry: entry.name):
        split = split_of(entry.name)
        if split is not None and entry.is_dir():
            if split in found:
                both = f"{os.path.basename(found[split])} and {entry.name}"
                raise ValueError(f"data folder {str(folder)!r}: {both} are both {split}; one of them is to go")
            found[split] = entry.path
    return found


def has_metadata(folder: str) -> bool:
    """Whether the labels of a folder of images stand in a file of the kind that `datasets` reads."""
    return any(os.path.exists(os.path.join(folder, f"metadata.{kind}")) for kind in ("csv", "jsonl", "parquet"))


def images_by_class(folder: str, files: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return path and class of each image in the folder of a split, None for one that lies in no folder of a class.

    Args:
        folder: Of the split.
        files: Paths, of which those below `folder` count.

    The folder below `folder` is the class, whatever it is called, and all below it belongs to it. Other files are left
    out with a warning, which says too where a folder of a class has no image.
    """
    found: list[tuple[str, str | None]] = []
    others = []
    empty = {entry.name for entry in _visible(folder) if entry.is_dir()}
    above = f"{folder}{os.sep}"
    for path in files:
        if not path.startswith(above):
            continue
        first, _, rest = path[len(above) :].partition(os.sep)
        if not is_image_name(path):
            others.append(path)
        else:
            # macOS and Linux may spell the same accents differently.
            found.append((path, unicodedata.normalize("NFC", first) if rest else None))
            empty.discard(first)
    if others:
        warnings.warn(f"{folder} holds files that are not images, and are left out: {listed(others, 1)}", stacklevel=2)
    if empty:
        warnings.warn(f"{folder} has folders without an image: {listed(sorted(empty))}", stacklevel=2)
    return found


def parquet_by_split(folder: Path, files: Sequence[str]) -> dict[str, list[str]]:
    """Return the parquet files of a folder by split: train, test or validation; none where none is for training.

    A split is named by a file's name up to the first character that is no letter, else by a folder above it.

    Raises:
        ValueError: files for training lie in several folders, as those of a data set with several configurations.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for path in files:
        if not path.lower().endswith(".parquet") or os.path.basename(path) == "metadata.parquet":
            continue
        parts = Path(path).relative_to(folder).parts
        for depth in reversed(range(len(parts))):
            word = re.match("[a-z]*", parts[depth].lower())
            split = _SPLIT_OF.get(word[0] if word else "")
            if split is not None:
                found.setdefault(os.path.join("", *parts[:depth]), {}).setdefault(split, []).append(path)
                break
    with_train = sorted(place for place, splits in found.items() if "train" in splits)
    if len(with_train) > 1:
        raise ValueError(
            f"data folder {str(folder)!r} has parquet files for training in several folders, {listed(with_train)}; "
            "give one of those"
        )
    return found[with_train[0]] if with_train else {}
