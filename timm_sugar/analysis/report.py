"""The report: a self-contained HTML page about one run or several, with pictures for print next to it."""

import importlib.util
import io
import re
import shlex
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
from markupsafe import Markup

import timm_sugar

from ..files import to_yaml, write_file
from ..metrics import METRICS, Metric, find_metric
from ..settings import names_of, to_flags
from . import report_charts as charts
from .comparison import read_comparison, remarks, result_tables
from .landscape import loss_range, summarise_landscape
from .palette import Style, assign_styles
from .plots import (
    ON_DARK,
    Figure,
    activation_ridges,
    dead_units_by_layer,
    landscape_contours,
    landscape_surfaces,
    metric_curves,
    rc_context,
    save,
)
from .run import RunRecord, finite, read_run, unique_names
from .seeds import counted, group_by_seed, interval

_TEMPLATE = Path(__file__).with_name("report.html")
_WORDS = ("activation", "state", "model")  # columns of the summary without numbers
_NOTHING = "–"  # noqa: RUF001
Groups = Mapping[str, Sequence[RunRecord]]  # name of each curve -> its run, or runs that differ only in their seed
Table = tuple[list[str], list[list[str]]]


def write_report(runs: Sequence[Path], output: Path) -> list[Path]:
    """Write a self-contained HTML page about one or several runs, and pictures next to it.

    For unfinished runs the page shows the results so far.

    Args:
        runs: Folders of training runs, or of comparisons, from which the selected runs are taken.
        output: The page, NAME.html. The pictures are NAME_curves.png and so on, each also as PDF.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError: a folder holds no run.
        ValueError: a file of a run is invalid, the same run is given twice, or `output` is not .html.
        OSError: the page or a picture cannot be written.
        ModuleNotFoundError: the extra "report" is not installed.
    """
    if output.suffix not in (".html", ".htm"):
        raise ValueError(f"the report is an HTML file, so its name must end in .html, not {output.name}")
    if importlib.util.find_spec("plotly") is None:
        raise ModuleNotFoundError("reports need plotly: pip install 'timm-sugar[report]'")

    found = [(folder, read_comparison(folder)) for folder in runs]
    runs = [
        folder / run
        for folder, compared in found
        for run in (["."] if compared is None else (run for row in compared["rows"] for run in row.get("runs", ())))
    ]
    records = [read_run(folder, name) for folder, name in zip(runs, unique_names(runs), strict=True)]
    groups = group_by_seed(records)
    output.parent.mkdir(parents=True, exist_ok=True)
    pictures = _draw_pictures(groups, output.with_suffix(""))
    write_file(output, _render(groups, [compared for _, compared in found if compared is not None]))
    return [output, *pictures]


def _styles(groups: Groups) -> dict[str, Style]:
    return dict(zip(groups, assign_styles([group[0].look for group in groups.values()]), strict=True))


def _metrics(groups: Groups) -> dict[str, list[list[dict[str, Any]]]]:
    return {name: [run.metrics for run in counted(group) if run.metrics] for name, group in groups.items()}


def _profiles(groups: Groups) -> dict[str, list[dict[str, Any]]]:
    return {name: [run.profile for run in group if run.profile] for name, group in groups.items()}


def _landscapes(groups: Groups) -> dict[str, dict[str, Any]]:
    return {run.name: run.landscape for group in groups.values() for run in group if run.landscape}


def _draw_pictures(groups: Groups, path: Path) -> list[Path]:
    """Draw the available plots as PNG and PDF, with names that begin with `path`, and return the PNG files."""
    figures: dict[str, Figure] = {}
    styles = _styles(groups)
    if begun := {name: runs for name, runs in _metrics(groups).items() if runs}:
        figures["curves"] = metric_curves(begun, styles=[styles[name] for name in begun])
    if profiles := {name: found for name, found in _profiles(groups).items() if found}:
        figures["dead_units"] = dead_units_by_layer(profiles, [styles[name] for name in profiles])
        each = {run.name: run.profile for group in groups.values() for run in group if run.profile}
        looks = [styles[name] for name, of_seeds in profiles.items() for _ in of_seeds]
        figures["activation_profile"] = activation_ridges(each, looks)
    if landscapes := _landscapes(groups):
        figures["landscape_contours"] = landscape_contours(landscapes)
        figures["landscape_surface"] = landscape_surfaces(landscapes)
    bases = {path.with_name(f"{path.name}_{name}"): figure for name, figure in figures.items()}
    for base, figure in bases.items():
        save(figure, base)
    return [base.with_name(base.name + ".png") for base in bases]


def _surface(found: dict[str, Any], highest: float, look: dict[Any, Any]) -> str:
    """Return a landscape as a surface plot, a PNG in base64."""
    content = io.BytesIO()
    with rc_context(look):
        landscape_surfaces({"": found}, highest).savefig(content, format="png", dpi=110, transparent=True)
    return b64encode(content.getvalue()).decode()


def _render(groups: Groups, compared: Sequence[Mapping[str, Any]]) -> str:
    """Return the page about runs, and about the comparisons that contain them."""
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    records = [record for group in groups.values() for record in group]
    curve_of = {record.name: i for i, group in enumerate(groups.values()) for record in group}
    profiled = {record.name: record.profile for record in records if record.profile}
    profiles, landscapes = _profiles(groups), _landscapes(groups)
    highest = loss_range(landscapes.values())[1] if landscapes else 0.0
    sections = {
        "curves": charts.curve_charts(_metrics(groups)),
        "dead": charts.dead_unit_charts(profiles),
        "gradients": charts.gradient_charts(profiles),
        "activation": charts.activation_charts(profiled, curve_of),
        "landscape": charts.landscape_charts(landscapes, curve_of),
    }
    differing, common = compare_settings(groups)
    return template.render(
        title=f"Run {records[0].name}" if len(records) == 1 else f"{len(records)} runs compared",
        groups=groups,
        runs=records,
        styles=[*_styles(groups).values()],
        summary=summary_table(groups),
        each=summary_table({record.name: [record] for record in records}) if len(groups) < len(records) else None,
        compared=[(result_tables(found), remarks(found)) for found in compared],
        sections=sections,
        charts=[chart for section in sections.values() for chart in section],
        profiled=profiled,
        dead_totals=charts.dead_unit_totals(profiles),
        landscapes={name: summarise_landscape(found) for name, found in landscapes.items()},
        surfaces={
            name: [_surface(found, highest, look) for look in ({}, ON_DARK)] for name, found in landscapes.items()
        },
        words=_WORDS,
        epochs={r.name: epoch_table(r.metrics) for r in records if r.metrics},
        classes={r.name: class_tables(r.summary) for r in records if r.summary and r.summary.get("test_class_top1")},
        differing=differing,
        common=common,
        commands=reproduce_commands(records),
        number=charts.number,
        version=timm_sugar.__version__,
        plotly=Markup(_inline_script(get_plotlyjs())),
    )


def summary_table(groups: Groups) -> tuple[list[str], dict[str, list[tuple[str, bool]]]]:
    """Return the headers of the columns for which any run has values, and the cells of each group of runs.

    A cell is its text, and whether it is the best of its column. For a group of runs with different seeds it is the
    mean with its 95% t-interval, over the finished runs if there are any. No cell is marked as best if all are equal,
    if only one group with a finished run has a value, or if the runs have different data.
    """
    records = [record for group in groups.values() for record in group]
    same_data = len({tuple(r.settings.get(name) for name in names_of("data")) for r in records}) == 1
    heads: list[str] = []
    cells: dict[str, list[tuple[str, bool]]] = {name: [] for name in groups}
    for metric in (metric for metric in METRICS if metric.column):
        values = {name: _values(group, metric.key) for name, group in groups.items()}
        if not any(values.values()):
            continue
        heads.append(metric.label)
        finished = {n: fmean(values[n]) for n, group in groups.items() if values[n] and any(r.summary for r in group)}
        best = None
        if metric.better and len({*finished.values()}) > 1 and (same_data or metric.split == "train"):
            best = (max if metric.better == "higher" else min)(finished.values())
        for name, cell in cells.items():
            cell.append((_text(metric, values[name]), best is not None and finished.get(name) == best))
    hidden = {"state"} if all(record.summary for record in records) else set()
    hidden |= {"seeds"} if len(groups) == len(records) else set()
    facts = {name: _facts(group) for name, group in groups.items()}
    for head in next(iter(facts.values())):
        if head not in hidden and any(row[head] is not None for row in facts.values()):
            heads.append(head)
            for name, cell in cells.items():
                cell.append((facts[name][head] or _NOTHING, False))
    return heads, cells


def _values(group: Sequence[RunRecord], key: str) -> list[float]:
    """Return a metric of each counted run: of its best epoch, or of the whole run if it is finished."""
    shown = counted(group)
    if key == "seconds" and not shown[0].summary:  # no run is finished
        values = [sum(finite(line.get(key)) or 0 for line in record.metrics) or None for record in shown]
    else:
        values = [finite({**record.best_line, **(record.summary or {})}.get(key)) for record in shown]
    return [value for value in values if value is not None]


def _facts(group: Sequence[RunRecord]) -> dict[str, str | None]:
    """Return the facts about runs apart from their metrics."""
    shown = counted(group)
    finished = sum(record.summary is not None for record in group)
    epochs = [(r.summary or {}).get("best_epoch", r.best_line.get("epoch")) for r in shown]
    one = shown[0]
    state = f"epoch {len(one.metrics)} of {one.settings.get('epochs', '?')}"
    if finished or len(group) > 1:
        state = "finished" if finished == len(group) else f"{finished} of {len(group)} finished"
    return {
        "seeds": ", ".join(str(record.settings.get("seed")) for record in shown),
        "activation": one.activation,
        "state": state,
        "best epoch": ", ".join(str(epoch) for epoch in epochs if epoch is not None) or None,
        "parameters": f"{one.summary['parameters']:,}" if one.summary and "parameters" in one.summary else None,
        "model": one.settings.get("model"),
    }


def _inline_script(code: str) -> str:
    """Escape JavaScript for an inline script element: end tags and control characters."""
    code = code.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    return re.sub(r"[\x00-\x08\x0b\x0e-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", code)


def compare_settings(groups: Groups) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the settings that differ, by name with the value of each group, and those that all groups share."""
    flat = [[_texts(run.settings) for run in group] for group in groups.values()]
    names = dict.fromkeys(name for group in flat for texts in group for name in texts)
    values = {
        name: [", ".join(dict.fromkeys(texts.get(name, "") for texts in group)) for group in flat]
        for name in names
        if name not in ("output", "left_open")
    }
    differing = {name: row for name, row in values.items() if len(set(row)) > 1}
    return differing, {name: row[0] for name, row in values.items() if name not in differing}


def _texts(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return settings as text; names of nested ones contain dots."""
    texts: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            texts |= _texts(value, f"{prefix}{name}.")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            texts[prefix + name] = "" if value is None else shown
    return texts


def reproduce_commands(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Return the name of each run and the shell commands that reproduce and measure it."""
    found = []
    for record in records:
        settings, name = record.settings, record.name.replace("/", "-")
        names = names_of("data", "result", "free")
        recipe = {name: settings[name] for name in names if settings.get(name) not in (None, [], {})}
        file, folder = f"{name}.yaml", f"output/{name}"
        processes = settings.get("processes", 1)
        several = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else []
        train = ["accelerate", "launch", *several, "-m", "timm_sugar.training", "--recipe", file, "--output", folder]
        given = ("data", "label_column", "image_column")
        data = to_flags({name: settings[name] for name in given if settings.get(name)})
        commands = [train, *(["timm-sugar", command, folder, *data] for command in ("verify", "profile", "landscape"))]
        written = [f"cat > {shlex.quote(file)} <<'END_OF_RECIPE'", to_yaml(recipe) + "END_OF_RECIPE"]
        found.append((record.name, "\n".join([*written, *map(shlex.join, commands)])))
    return found


def class_tables(summary: Mapping[str, Any]) -> tuple[Table, Table | None]:
    """Return header and rows of the accuracy by class, lowest first, and of the confusion matrix, or None."""
    accuracy, confusion = summary["test_class_top1"], summary.get("test_confusion")
    names, metric = [*accuracy], find_metric("test_class_top1")
    order = sorted(range(len(names)), key=lambda i: (accuracy[names[i]] is None, accuracy[names[i]]))
    texts = {name: _NOTHING if value is None else metric.text(value) for name, value in accuracy.items()}
    rows = [[names[i], texts[names[i]]] for i in order]
    if confusion is None:
        return (["class", metric.label], rows), None
    for i, row in zip(order, rows, strict=True):
        wrong = sorted(((count, j) for j, count in enumerate(confusion[i]) if j != i and count), key=lambda w: -w[0])
        row += [str(sum(confusion[i])), ", ".join(f"{names[j]} ({count})" for count, j in wrong[:3]) or _NOTHING]
    matrix = [[name, *map(str, counts)] for name, counts in zip(names, confusion, strict=True)]
    return (["class", metric.label, "images", "taken for"], rows), (["", *names], matrix)


def epoch_table(metrics: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the metrics by epoch, as a text alternative to the curves."""
    shown = [metric for metric in METRICS if any(line.get(metric.key) is not None for line in metrics)]
    rows = []
    for line in metrics:
        values = [[] if line.get(metric.key) is None else [line[metric.key]] for metric in shown]
        rows.append([str(line["epoch"]), *map(_text, shown, values)])
    return ["epoch", *(metric.label for metric in shown)], rows


def _text(metric: Metric, values: Sequence[float]) -> str:
    """Return a value, or the mean of several with its interval."""
    if not values:
        return _NOTHING
    half = interval(values)
    return metric.text(fmean(values)) + ("" if half is None else f" ± {metric.text(half)}")
