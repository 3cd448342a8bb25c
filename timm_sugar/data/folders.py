"""Local folders of images, SPLIT/CLASS/any depth, and of parquet files for each split."""

import os
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

# Names of folders, and first words of parquet file names, case-insensitive.
_SPLIT_OF = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
HELD_OUT = ("test", "validation", "valid", "val")  # in order of preference, as named on the Hub


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return the first `most` names for a message, and the number of further ones."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def files_below(folder: Path) -> list[str]:
    """Return the sorted paths of all files below a folder, following symbolic links and skipping hidden names.

    Raises:
        ValueError: a symbolic link leads back to a folder that contains it.
        OSError: a folder cannot be read.
    """
    return sorted(_files_below(str(folder), ()))


def _files_below(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise ValueError(f"{folder} leads back, through a symbolic link, to a folder that contains it; remove the link")
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _files_below(entry.path, (*above, here))
        else:
            yield entry.path


def _visible(folder: Path | str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]


def is_image_name(path: str) -> bool:
    """Whether Pillow supports this file extension."""
    extensions = Image.registered_extensions()
    return extensions.get(os.path.splitext(path)[1].lower()) in Image.OPEN


def split_of(name: str) -> str | None:
    """Return the split that a folder of this name holds: "train", "test", "validation" or None."""
    return _SPLIT_OF.get(name.lower())


def split_folders(folder: Path) -> dict[str, str]:
    """Return the top-level folders that hold a split, by split; ValueError if two name the same one."""
    found: dict[str, str] = {}
    for entry in sorted(_visible(folder), key=lambda entry: entry.name):
        split = split_of(entry.name)
        if split is not None and entry.is_dir():
            if split in found:
                both = f"{os.path.basename(found[split])} and {entry.name}"
                raise ValueError(f"data folder {str(folder)!r}: {both} both hold the {split} split; keep one")
            found[split] = entry.path
    return found


def images_by_class(folder: str, files: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return path and class of the images among `files` in the folder of a split; None outside of class folders.

    Files that are not images are skipped; a warning names them, and class folders without images.
    """
    found: list[tuple[str, str | None]] = []
    others = []
    empty = {entry.name for entry in _visible(folder) if entry.is_dir()}
    above = f"{folder}{os.sep}"
    for path in files:
        if path.startswith(above):
            first, _, rest = path.removeprefix(above).partition(os.sep)
            if is_image_name(path):
                # macOS may decompose accented letters (NFD).
                found.append((path, unicodedata.normalize("NFC", first) if rest else None))
                empty.discard(first)
            else:
                others.append(path)
    if others:
        warnings.warn(f"{folder} has files that are not images and are left out: {listed(others, 1)}", stacklevel=2)
    if empty:
        warnings.warn(f"{folder} has class folders without images: {listed(sorted(empty))}", stacklevel=2)
    return found


def parquet_by_split(folder: Path, files: Sequence[str]) -> dict[str, list[str]]:
    """Return the parquet files of a folder by split; an empty dict if there are none for training.

    The split is the first word of the file's name, or else of the nearest folder above it whose first word is a split.

    Raises:
        ValueError: several folders have training files, as in a data set with several configurations.
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
