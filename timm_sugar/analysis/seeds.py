"""Runs that differ only in their seed: grouping, means and confidence intervals."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from ..metrics import Metric
from ..settings import names_of
from .run import RunRecord, finite

Point = tuple[float, float, float | None]  # x, mean, and half the width of its interval, or None


def group_by_seed(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Group runs whose settings differ only in the seed.

    Args:
        records: Runs, finished or not.

    Returns:
        Name of each group -> its runs, both in the given order. A single run keeps its name; the name of a group is
        the common part of its runs' names: "relu" for "seed0/relu" and "seed1/relu".
    """
    compared = sorted({*names_of("data", "result"), "processes", "data_fingerprint"} - {"seed"})
    by_settings: dict[str, list[RunRecord]] = {}
    for record in records:
        by_settings.setdefault(repr([record.settings.get(name) for name in compared]), []).append(record)
    groups: list[list[RunRecord]] = []
    for runs in by_settings.values():
        seeds = {run.settings.get("seed") for run in runs}
        groups += [runs] if len(seeds) == len(runs) else [[run] for run in runs]  # no group if a seed occurs twice
    groups.sort(key=lambda runs: records.index(runs[0]))
    names = [_common_name([run.name for run in runs]) for runs in groups]
    doubtful = {name for name in names if not name or names.count(name) > 1}
    return {
        f"{runs[0].name} and {len(runs) - 1} more" if name in doubtful and len(runs) > 1 else name: runs
        for name, runs in zip(names, groups, strict=True)
    }


def counted(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the runs of a group that the mean covers: the finished ones, or all if none is finished."""
    return [record for record in records if record.summary] or list(records)


def interval(values: Sequence[float]) -> float | None:
    """Return half the width of the 95% t-interval of the mean; None for fewer than two values.

    Examples:
        >>> round(interval([1.0, 2.0, 3.0]), 3)
        2.484
    """
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def mean_by_epoch(
    runs: Sequence[Sequence[Mapping[str, Any]]],
    metric: Metric,
    spread: Callable[[Sequence[float]], float | None] = interval,
) -> list[Point]:
    """Return the mean of a metric by epoch, in its unit, for the epochs that all runs have.

    Args:
        runs: The lines of each run's metrics.jsonl.
        metric: The metric.
        spread: Function from the values of several runs to half the width of the interval.
    """
    found = [
        {line["epoch"]: metric.scale * value for line in run if (value := finite(line.get(metric.key))) is not None}
        for run in runs
    ]
    epochs = sorted(set.intersection(*map(set, found))) if found else []
    columns = [[values[epoch] for values in found] for epoch in epochs]
    spreads = [spread(column) if len(column) > 1 else None for column in columns]
    return [*zip(epochs, map(fmean, columns), spreads, strict=True)]


def band(points: Sequence[Point], limits: tuple[float, float]) -> list[tuple[float, float, float]]:
    """Return x, lower and upper end of each interval, clipped to `limits`; skip points without one."""
    low, high = limits
    return [(x, max(mean - half, low), min(mean + half, high)) for x, mean, half in points if half is not None]


def dead_by_layer(seeds: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[tuple[float, ...]]]:
    """Return the percentage of dead units of each layer.

    Args:
        seeds: For each seed, the content of a profile.json.

    Returns:
        The means, and two lists with the lower and upper lengths of their intervals; none for one seed.
    """
    columns = zip(*(found["layers"] for found in seeds), strict=True)
    shares = [[100 * layer["dead"] / layer["units"] for layer in column] for column in columns]
    means = [*map(fmean, shares)]
    if len(seeds) < 2:
        return means, []
    ends = band([(mean, mean, interval(share)) for mean, share in zip(means, shares, strict=True)], (0, 100))
    return means, [*zip(*((mean - low, high - mean) for mean, low, high in ends), strict=True)]


def _common_name(names: Sequence[str]) -> str:
    """Return the parts, between separators, that all names share at the same position."""
    parts = [re.findall(r"[/_.\s-]|[^/_.\s-]+", name) for name in names]
    if len({len(each) for each in parts}) > 1:
        return ""
    common = "".join(each[0] for each in zip(*parts, strict=True) if len({*each}) == 1)
    return re.sub(r"([/_.\s-])[/_.\s-]+", r"\1", common).strip("/_.- ") if len(names) > 1 else names[0]
