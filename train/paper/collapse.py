"""Evaluation of the runs of appendix A: categories, intervals, the theoretical bound and the rows of table 2."""

from statistics import median
from typing import Any

from scipy.stats import binomtest, fisher_exact

from .dying_relu import Cell

# Table 3: the paper's ranges of the final loss. Its unit is unknown, so losses are divided by the loss of a
# constant prediction: ours by the variance of the target, the paper's by its own category (A).
TABLE3 = {
    "f1": {"A": (15.5818, 15.7392), "B": (10.5453, 11.0175), "C": (0.0003, 0.6299)},
    "f2": {"A": (36.2548, 36.6155), "D": (0.5452, 27.2373)},
    "f3": {"A": (19.2409, 19.4284), "D": (0.6767, 1.4268)},
    "f4": {"A": (81.0379, 81.5630), "D": (29.0563, 64.7609)},
}
COLLAPSED = 0.97  # a run is in (A) at this share of the variance or above; the minimum of table 3's (A) is 0.995

# Table 2: percent of runs. He and RAI are quoted there from Lu et al.; f4 came from 20 hidden layers.
PAPER_RUNS = {"he": 1000, "rai": 1000, "sugar_bsilu": 100}
PAPER = {
    ("f1", "he"): {"A": 93.6, "B": 4.2, "C": 2.2},
    ("f1", "rai"): {"A": 40.3, "B": 22.4, "C": 37.3},
    ("f1", "sugar_bsilu"): {"A": 15.0, "B": 8.0, "C": 77.0},
    ("f2", "he"): {"A": 91.9, "D": 8.1},
    ("f2", "rai"): {"A": 29.2, "D": 70.8},
    ("f2", "sugar_bsilu"): {"A": 9.0, "D": 91.0},
    ("f3", "he"): {"A": 93.8, "D": 6.2},
    ("f3", "rai"): {"A": 32.6, "D": 67.4},
    ("f3", "sugar_bsilu"): {"A": 2.0, "D": 98.0},
    ("f4", "he"): {"A": 76.8, "D": 23.2},
    ("f4", "rai"): {"A": 9.6, "D": 90.4},
    ("f4", "sugar_bsilu"): {"A": 8.0, "D": 92.0},
}


def paper_function(function: str) -> str:
    """The paper's name of a target: "f4_abs" is our second reading of its f4."""
    return function.removesuffix("_abs")


def relative_ranges(function: str) -> dict[str, tuple[float, float]]:
    """Table 3's loss range of each category, divided by the middle of that of (A)."""
    ranges = TABLE3[paper_function(function)]
    constant = sum(ranges["A"]) / 2
    return {category: (low / constant, high / constant) for category, (low, high) in ranges.items()}


def learned_below(function: str) -> float | None:
    """The threshold between (C) and (B), halfway between table 3's ranges; None if the paper has none."""
    ranges = relative_ranges(function)
    return (ranges["C"][1] + ranges["B"][0]) / 2 if "C" in ranges else None


def categorise(function: str, loss: float) -> str:
    """The category of a run: "A" collapsed; f1: "B" partly learned, "C" learned; others: "D" not collapsed.

    Args:
        function: A key of `TARGETS`.
        loss: Final mean squared error divided by the variance of the target.
    """
    if not loss < COLLAPSED:  # a NaN has not learned either
        return "A"
    border = learned_below(function)
    if border is None:
        return "D"
    return "C" if loss < border else "B"


def born_dead_bound(depth: int, width: int) -> float:
    """A lower bound on the probability that a ReLU network with scalar input is dead before training.

    The setting is that of Lu et al. (2020) for d_in = 1: independent weights symmetric about 0, zero biases and inputs
    of both signs. The derivation is our own. Such a network is linear on each half-line, so it maps two rays through
    the layers. With N units, a ray dies in a layer with probability 2**-N. Two live rays lie in one orthant, so the
    angle between them is at most 90 degrees: both die with probability at least 4**-N, and with probability at least
    N * 4**-N both survive in the same single unit and behave as one ray from then on. The bound is this Markov chain,
    started after the first layer, where the two rays are in different units.

    Args:
        depth: Number of hidden layers.
        width: N, units per hidden layer.
    """
    all_dead = 2.0**-width
    one = 1 - all_dead  # a single ray survives
    two = 1 - 2 * all_dead - (width - 1) * all_dead**2  # two separate rays survive as separate rays
    weight = (1 - 2 * all_dead) * (1 - all_dead) / (1 + (width - 1) * all_dead)
    steps = depth - 1
    return 1 - one**steps - weight * (one**steps - two**steps)


def table_row(cell: Cell, result: dict[str, Any]) -> dict[str, Any]:
    """The row of table2.json for the result of one cell.

    Returns:
        JSON-ready: `function`, `method`, `depth`, `width`, `runs`; `A` to `D` in percent, null if the paper has no
        such category; `interval`, their Wilson 95% intervals; `paper`, its figures if it has this cell, and
        `paper_p`, the p-value of Fisher's exact test of the difference between our runs and the paper's for each;
        `outside_table3`, percent of runs whose loss is outside all of table 3's ranges; `born_dead` and `dead`,
        percent of runs with a hidden layer inactive on every sample before and after training; `lowest_loss`,
        `median_loss`, relative to the variance.
    """
    losses = [loss / variance for loss, variance in zip(result["loss"], result["variance"], strict=True)]
    found = [categorise(cell.function, loss) for loss in losses]
    ranges = relative_ranges(cell.function)
    counts = {category: found.count(category) for category in ranges}
    tolerance = 0.005  # the paper divides by a constant known to 1%
    outside = sum(not any(a - tolerance <= loss <= b + tolerance for a, b in ranges.values()) for loss in losses)
    named = (cell.depth, cell.width) in paper_shapes(cell.function, cell.method)
    paper = PAPER.get((paper_function(cell.function), cell.method)) if named else None
    return {
        "function": cell.function,
        "method": cell.method,
        "depth": cell.depth,
        "width": cell.width,
        "runs": cell.runs,
        **{c: _percent(counts[c], cell.runs) if c in counts else None for c in "ABCD"},
        "interval": {c: wilson_interval(n, cell.runs) for c, n in counts.items()},
        "paper": paper,
        "paper_p": paper and {c: chance(counts[c], cell.runs, paper[c], PAPER_RUNS[cell.method]) for c in paper},
        "outside_table3": _percent(outside, cell.runs),
        "born_dead": _percent(sum(result["born_dead"]), cell.runs),
        "dead": _percent(sum(result["dead"]), cell.runs),
        "lowest_loss": round(min(losses), 4),
        "median_loss": round(median(losses), 4),
    }


def wilson_interval(count: int, runs: int) -> list[float]:
    """Wilson's 95% interval of a share of the runs, in percent (Wilson 1927)."""
    found = binomtest(count, runs).proportion_ci(0.95, "wilson")
    return [round(100 * float(end), 1) for end in (found.low, found.high)]


def chance(count: int, runs: int, percent: float, other_runs: int) -> float:
    """The two-sided p-value of Fisher's exact test that `count` of `runs` and a percentage of others differ."""
    other = round(percent / 100 * other_runs)
    return round(float(fisher_exact([[count, runs - count], [other, other_runs - other]]).pvalue), 3)


def paper_shapes(function: str, method: str) -> tuple[tuple[int, int], ...]:
    """Depths and widths at which we compare with the paper's figure.

    20 and 4 for He and RAI on f4. Otherwise 10 and 2, and 9 and 2, since the "10 layers" of Lu et al. may include the
    output layer.
    """
    return ((20, 4),) if paper_function(function) == "f4" and method in ("he", "rai") else ((10, 2), (9, 2))


def _percent(count: int, runs: int) -> float:
    return round(100 * count / runs, 1)
