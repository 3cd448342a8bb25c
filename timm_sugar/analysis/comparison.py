"""Results of a comparison: paired differences, the verdict, and tables for terminal and report."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..files import read_mapping
from .seeds import interval

FILE = "compare.json"  # in the folder of a comparison; the result of `timm_sugar.training.compare.table`
_LEVEL = 0.05
Table = tuple[str, list[str], list[list[str]]]


def read_comparison(folder: Path) -> dict[str, Any] | None:
    """Return the result of the comparison in a folder; None if the folder holds none.

    Raises:
        ValueError: no seed is finished yet.
    """
    if not (folder / FILE).is_file():
        return None
    found = read_mapping(folder / FILE)
    if not any("runs" in row for row in found.get("rows", ())):
        raise ValueError(f"the comparison in {folder} has no seed yet of which all runs are finished")
    return found


def paired(differences: Sequence[float]) -> dict[str, Any]:
    """Return mean, 95% t-interval and p-value of per-seed differences.

    Example:
        >>> found = paired([0.01, 0.02, 0.03])
        >>> round(found["low"], 4), round(found["high"], 4), round(found["p"], 4)
        (-0.0048, 0.0448, 0.0742)
    """
    mean, half = fmean(differences), interval(differences)
    p = None
    if half:  # if all are equal, the spread is unknown
        from scipy.stats import t

        p = float(2 * t.sf(abs(mean) / stdev(differences) * math.sqrt(len(differences)), len(differences) - 1))
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return dict(difference=mean, low=low, high=high, p=p, differences=list(differences))


def verdict(found: Mapping[str, Any]) -> str:
    """Return the conclusion of a table in one sentence, limited to what its seeds and comparisons support."""
    n, rows = len(found["seeds"]), found["rows"]
    if found["done"] < found["runs"]:
        left = f"Not finished: {found['done']} of {found['runs']} runs are"
        return f"{left}; so far nothing is shown." if n < 2 else f"{left}, and {n} seeds are too early a verdict."
    base = rows[0]["activation"]
    if rows[0]["rate"] is None:
        return f"Nothing can be compared: {base} has no rate with which each loss stays finite."
    compared = [row for row in rows[1:] if row["rate"] is not None]
    parts = []
    for row in rows[1:]:
        name = row["activation"]
        if row not in compared:
            parts.append(f"{name} has no rate with which each loss stays finite")
        elif row["low"] is None:
            parts.append(f"no difference shown between {name} and {base}: one seed has no interval")
        elif row["p"] is not None and row["p"] * len(compared) < _LEVEL:
            better = "better" if row["difference"] > 0 else "worse"
            parts.append(f"{name} is {better} than {base} here ({difference_text(row)} points)")
        else:
            reason = ""
            if row["p"] is None:
                reason = "; each seed has the same, so that nothing tells the spread"
            elif row["p"] < _LEVEL:
                reason = f"; it leaves out 0, but is one of {len(compared)}"
            parts.append(f"no difference shown between {name} and {base} ({difference_text(row)} points{reason})")
    several = f", {len(compared)} comparisons taken together (Bonferroni)" if len(compared) > 1 else ""
    how = f"paired t-test over n = {n} seed{'s' if n > 1 else ''}{several}, on {found['test_images']:,} test images"
    return f"{'; '.join(parts)}: {how}."


def difference_text(row: Mapping[str, Any]) -> str:
    """Return the difference of a row of `table` with its interval, in points."""
    if row.get("difference") is None:
        return "-"
    shown = f"{100 * row['difference']:+.2f}"
    return shown if row["low"] is None else f"{shown} [{100 * row['low']:+.2f}, {100 * row['high']:+.2f}]"


def result_tables(found: Mapping[str, Any]) -> list[Table]:
    """Return title, header and rows of the tables of a comparison, in percent; empty if no seed is finished."""

    def percent(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{100 * value:.{digits}f}"

    rows = [row for row in found["rows"] if row["rate"] is not None]
    if not rows:
        return []
    lines = []
    for row in rows:
        half = "" if row["test_interval"] is None else f" ± {percent(row['test_interval'])}"
        p = "-" if row.get("p") is None else f"{row['p']:.3f}"
        test, dead = f"{percent(row['test_top1'])}{half}", percent(row["dead_units"])
        line = [row["activation"], f"{row['rate']:g}", percent(row["val_top1"]), test, difference_text(row), p, dead]
        lines.append(line)
    head = ["activation", "best rate", "validation (%)", "test (%)", "difference (points)", "p", "dead units (%)"]
    n = len(found["seeds"])
    title = f"mean of {n} seed{'s' if n > 1 else ''}, with 95% t-intervals; differences are paired by seed"
    columns = zip(found["classes"], *(row["class_top1"] for row in rows), strict=True)
    classes = [[name, *(percent(value, 1) for value in values)] for name, *values in columns]
    by_class = ["class", *(row["activation"] for row in rows)]
    return [(title, head, lines), ("test accuracy by class (%)", by_class, classes)]


def remarks(found: Mapping[str, Any]) -> list[str]:
    """Return the remarks below the tables: rates at the edge of the grid, then the verdict."""
    edges = []
    for row in found["rows"]:
        if row.get("edge"):
            more = "lower" if row["edge"] == "lowest" else "higher"
            edges.append(f"{row['activation']} is best at the {row['edge']} rate: try {more} ones too, with --lrs")
    return [*edges, found["verdict"]]
