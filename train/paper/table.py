"""The table of a sweep: accuracy of each cell over the seeds, with the paper's, as JSON, Markdown and bars."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from timm_sugar.analysis.seeds import interval
from timm_sugar.files import write_file

_SUGAR = "sugar_"


def make_table(
    recipe: str,
    runs: Sequence[tuple[str, int, dict[str, Any] | None]],
    paper: Mapping[str, Sequence[float] | None],
    command: str,
) -> dict[str, Any]:
    """Collect the runs of a sweep.

    Args:
        recipe: Name of the recipe.
        runs: Cell, seed, and the summary of the run (its summary.json), or None if it is not finished.
            The cell ``sugar_NAME`` is NAME with SUGAR.
        paper: The paper's accuracy and standard deviation for a cell, as fractions of 1.
        command: The command line of the sweep.

    Returns:
        recipe, command, seeds, missing runs, fields that all summaries share, total hours of training, Spearman's rank
        correlation with the paper's accuracies and the number of cells in it, and the cells: name, accuracy by seed,
        mean, interval (half the width of the mean's 95% t-interval over the seeds, None for one seed), the paper's mean
        and standard deviation. A SUGAR cell also has its gain over the same activation without SUGAR (mean over the
        seeds), the interval of the gain, and the paper's gain. Accuracies are fractions of 1.
    """
    by_cell: dict[str, dict[int, float]] = {name: {} for name, _, _ in runs}
    summaries = [summary for _, _, summary in runs if summary]
    for name, seed, summary in runs:
        if summary:
            by_cell[name][seed] = summary["test_top1"]
    cells = []
    for name, accuracies in by_cell.items():
        figure, without = paper.get(name) or (None, None), name.removeprefix(_SUGAR)
        cell: dict[str, Any] = dict(
            name=name,
            accuracy=accuracies,
            **_mean_and_interval([*accuracies.values()]),
            paper=figure[0],
            paper_std=figure[1],
        )
        if without != name and without in by_cell:
            base = by_cell[without]
            gains = _mean_and_interval([accuracies[seed] - base[seed] for seed in accuracies if seed in base])
            cell |= dict(gain=gains["mean"], gain_interval=gains["interval"], paper_gain=None)
            base_figure = paper.get(without)
            if figure[0] is not None and base_figure:
                cell["paper_gain"] = round(figure[0] - base_figure[0], 6)
        cells.append(cell)
    both = [(cell["mean"], cell["paper"]) for cell in cells if cell["mean"] is not None and cell["paper"] is not None]
    return dict(
        recipe=recipe,
        command=command,
        seeds=list(dict.fromkeys(seed for _, seed, _ in runs)),
        missing=[f"seed{seed}/{name}" for name, seed, summary in runs if not summary],
        **_shared(summaries),
        hours=sum(summary["seconds"] for summary in summaries) / 3600,
        spearman=_spearman(both),
        spearman_cells=len(both),
        cells=cells,
    )


def _mean_and_interval(values: Sequence[float]) -> dict[str, float | None]:
    return dict(mean=fmean(values) if values else None, interval=interval(values))


def _spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    if any(len(set(side)) < 3 for side in zip(*pairs, strict=True)) or not pairs:
        return None
    from scipy.stats import spearmanr  # a dependency of scikit-learn, in the extra "train"

    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def _shared(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the fields that are equal in all runs."""
    if not summaries:
        return {}
    names = ("model", "epochs", "train_images", "val_images", "test_images", "versions")
    shared = {name: summaries[0][name] for name in names if all(s[name] == summaries[0][name] for s in summaries[1:])}
    data = {Path(summary["data"]).name for summary in summaries}
    return shared | (dict(data=data.pop()) if len(data) == 1 else {})


def write_table(table: dict[str, Any], folder: Path, into: Path | None = None) -> None:
    """Write table.json, table.md, and bars.png and bars.pdf if matplotlib is installed and ReLU's cell is finished.

    Args:
        table: The table from `make_table`.
        folder: Output folder.
        into: A Markdown file; the table replaces the text between ``<!-- RECIPE -->`` and ``<!-- /RECIPE -->``.

    Raises:
        ValueError: that file does not contain these markers.
    """
    shown = markdown(table)
    if into is not None:
        replace_between(into, table["recipe"], shown)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "table.json", json.dumps(table, indent=2) + "\n")
    write_file(folder / "table.md", shown)
    rows = [_percentages(cell) for cell in table["cells"] if cell["mean"] is not None]
    if importlib.util.find_spec("matplotlib") and any(row["activation"] == "relu" for row in rows):
        from timm_sugar.analysis.plots import save

        from .figures import accuracy_bars

        save(accuracy_bars(rows, _title(table)), folder / "bars")


def replace_between(page: Path, name: str, text: str) -> None:
    """Write `text` between the markers ``<!-- NAME -->`` and ``<!-- /NAME -->`` of a Markdown file.

    Raises:
        ValueError: the file does not contain the markers.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found_too, after = rest.partition(end)
    if not (found and found_too):
        raise ValueError(f"{page} does not hold {begin} and {end}")
    write_file(page, f"{before}{begin}\n\n{text}\n{end}{after}")


def _title(table: dict[str, Any]) -> str:
    epochs = f"{table['epochs']} epochs" if "epochs" in table else ""
    seeds = f"seed{'s' if len(table['seeds']) > 1 else ''} {', '.join(map(str, table['seeds']))}"
    return f"{table['recipe']}: {', '.join(filter(None, (table.get('data'), epochs, seeds)))}"


def _percentages(cell: dict[str, Any]) -> dict[str, Any]:
    half = None if cell["interval"] is None else 100 * cell["interval"]
    return dict(activation=cell["name"], top1_percent=100 * cell["mean"], interval_percent=half)


def markdown(table: dict[str, Any]) -> str:
    """Return the Markdown table: one row per activation, alone and with SUGAR, in percent."""
    cells = {cell["name"]: cell for cell in table["cells"]}
    count = len(table["seeds"])
    lines = [
        "| activation | alone | with SUGAR | gain | paper: alone | with SUGAR | gain |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for name in dict.fromkeys(name.removeprefix(_SUGAR) for name in cells):
        base, sugar = cells.get(name, {}), cells.get(_SUGAR + name, {})
        row = [
            _measured(base, count),
            _measured(sugar, count),
            _percent(sugar.get("gain"), sugar.get("gain_interval"), "+"),
        ]
        row += [_percent(cell.get("paper"), cell.get("paper_std")) for cell in (base, sugar)]
        lines.append("| " + " | ".join([name, *row, _percent(sugar.get("paper_gain"), None, "+")]) + " |")
    return "\n".join([*lines, "", *_notes(table)]) + "\n"


def _notes(table: dict[str, Any]) -> list[str]:
    seeds = ", ".join(map(str, table["seeds"]))
    spread = "; seed"
    if len(table["seeds"]) > 1:
        spread = ", mean and 95% t-interval (the paper's: standard deviation); gains are paired by seed; seeds"
    notes = [f"Test accuracy in percent{spread} {seeds}. `{table['command']}`"]
    if "versions" in table:
        versions = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
        notes.append(
            f"`{table['model']}` on {table.get('data', 'data')}: {table['train_images']:,} training, "
            f"{table['val_images']:,} validation and {table['test_images']:,} test images, {table['epochs']} epochs, "
            f"the best by validation accuracy; {table['hours']:.1f} hours of training in all; {versions}."
        )
    if table["spearman"] is not None:
        notes.append(
            f"Spearman's rank correlation with the paper's accuracies: {table['spearman']:.2f} over "
            f"{table['spearman_cells']} cells."
        )
    if table["missing"]:
        notes.append(f"**Not finished: {', '.join(table['missing'])}.**")
    return [line for note in notes for line in (note, "")][:-1]


def _measured(cell: dict[str, Any], seeds: int) -> str:
    shown, done = _percent(cell.get("mean"), cell.get("interval")), len(cell.get("accuracy", ()))
    return f"{shown} ({done} of {seeds} seeds)" if 0 < done < seeds else shown


def with_interval(values: Sequence[float], sign: str = "", digits: int = 2) -> str:
    """Return the mean and its 95% t-interval as text, "+2.0 ± 2.5"; only the mean if there is no interval."""
    half = interval(values)
    return f"{fmean(values):{sign}.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def _percent(value: float | None, spread: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{100 * value:{sign}.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")
