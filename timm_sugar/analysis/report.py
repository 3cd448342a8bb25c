"""A run, or several compared, on one self-contained HTML page."""

from collections.abc import Sequence
from pathlib import PurePath


def unique_names(paths: Sequence[str | PurePath]) -> list[str]:
    """Return the last part of each path, or as many parts as tell them apart.

    Raises:
        ValueError: a path is there twice.
    """
    parts = [PurePath(path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("the same folder is given twice")
