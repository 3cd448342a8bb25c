"""The report: one run, or several compared, on a self-contained HTML page."""

import importlib.util
import re
import shlex
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
from .landscape import summarise_landscape
from .palette import assign_styles
from .report_pictures import draw_pictures, surface_images
from .run import RunRecord, finite, read_run, unique_names
from .seeds import counted, group_by_seed, interval

_TEMPLATE = Path(__file__).with_name("report.html")
_WORDS = ("activation", "state", "model")  # columns of the summary that hold no numbers
_NOTHING = "–"  # noqa: RUF001


def write_report(runs: Sequence[Path], output: Path) -> list[Path]:
    """Write a self-contained HTML page about one or several runs, and pictures beside it.

    Runs that are not finished are shown as far as they are.

    Args:
        runs: Folders that training has written to, or of a comparison, of which the chosen runs are taken.
        output: The page, NAME.html. The pictures are NAME_curves.png and so on, each as PDF too.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError: a folder holds no run.
        ValueError: a file of a run is not what a run writes, the same run is given twice, or `output` is not .html.
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
    pictures = draw_pictures(groups, output.with_suffix(""))
    write_file(output, render(groups, [compared for _, compared in found if compared is not None]))
    return [output, *pictures]


def render(groups: Mapping[str, Sequence[RunRecord]], compared: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the page about runs, gathered by `group_by_seed`, in the order in which they are given.

    Args:
        groups: Name of each group -> its runs.
        compared: What the comparisons say that they are from.
    """
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    records = [record for group in groups.values() for record in group]
    alone = {record.name: [record] for record in records}
    curve_of = {record.name: i for i, group in enumerate(groups.values()) for record in group}
    profiled = {r.name: r.profile for r in records if r.profile is not None}
    profiles = {
        i: (name, found)
        for i, (name, group) in enumerate(groups.items())
        if (found := [profiled[r.name] for r in group if r.name in profiled])
    }
    landscapes = {r.name: r.landscape for r in records if r.landscape is not None and r.landscape_is_complete}
    dead = charts.dead_unit_chart(profiles) if profiles else None
    sections = {
        "curves": charts.curve_charts(
            {name: [r.metrics for r in counted(group) if r.metrics] for name, group in groups.items()}
        ),
        "dead": [dead] if dead else [],
        "gradients": list(filter(None, [charts.gradient_chart(profiles)])) if profiles else [],
        "activation": [
            charts.activation_chart(place, curve_of[name], name, found)
            for place, (name, found) in enumerate(profiled.items())
        ],
        "landscape": _landscape_charts(landscapes, curve_of),
    }
    differing, common = compare_settings(groups)
    return template.render(
        title=f"Run {records[0].name}" if len(records) == 1 else f"{len(records)} runs compared",
        groups=groups,
        runs=records,
        styles=assign_styles([group[0].look for group in groups.values()]),
        summary=summary_table(groups),
        each=summary_table(alone) if len(groups) < len(records) else None,
        compared=[(result_tables(found), remarks(found)) for found in compared],
        sections=sections,
        charts=[chart for section in sections.values() for chart in section],
        profiled=profiled,
        dead_totals=charts.dead_unit_totals(profiles),
        landscapes={name: summarise_landscape(found) for name, found in landscapes.items()},
        surfaces=surface_images(landscapes),
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


Cell = tuple[str, bool]
Table = tuple[list[str], list[list[str]]]


def summary_table(groups: Mapping[str, Sequence[RunRecord]]) -> tuple[list[str], dict[str, list[Cell]]]:
    """Return the heads of the columns that any run has values for, and for each group of runs its cells.

    Of several runs, which differ in their seed alone, a cell is the mean with its 95% t-interval, of the finished ones
    where there are any. A cell is its text, and whether it is the best of its column. None is marked where all are
    equal, where only one group with a finished run has a value, or where values cannot be compared because the runs
    have other data.
    """
    records = [record for group in groups.values() for record in group]
    same_data = len({tuple(r.settings.get(name) for name in names_of("data")) for r in records}) == 1
    shown = [metric for metric in METRICS if metric.column]
    measured = {name: {m.label: _values(group, m.key) for m in shown} for name, group in groups.items()}
    others = {name: _facts(group) for name, group in groups.items()}
    metrics = {m.label: m for m in shown if any(row[m.label] for row in measured.values())}
    hidden = {"state"} if all(record.summary for record in records) else set()
    hidden |= {"seeds"} if len(groups) == len(records) else set()
    rest = [head for head in next(iter(others.values())) if any(row[head] is not None for row in others.values())]
    rest = [head for head in rest if head not in hidden]
    cells: dict[str, list[Cell]] = {name: [] for name in groups}
    for head, metric in metrics.items():
        means = {name: fmean(row[head]) for name, row in measured.items() if row[head]}
        known = {means[name] for name, group in groups.items() if name in means and any(r.summary for r in group)}
        comparable = metric.better is not None and len(known) > 1 and (same_data or metric.split == "train")
        best = (max if metric.better == "higher" else min)(known) if comparable else None
        for name, cell in cells.items():
            is_best = best is not None and means.get(name) == best and any(r.summary for r in groups[name])
            cell.append((_text(metric, measured[name][head]), is_best))
    for name, cell in cells.items():
        cell.extend((others[name][head] or _NOTHING, False) for head in rest)
    return [*metrics, *rest], cells


def _values(group: Sequence[RunRecord], key: str) -> list[float]:
    return [value for record in counted(group) if (value := _value(record, key)) is not None]


def _value(record: RunRecord, key: str) -> float | None:
    """Return a metric of the epoch that counts, or of the whole run where it is finished."""
    if key == "seconds" and not record.summary:
        return sum(finite(line.get(key)) or 0 for line in record.metrics) or None
    return finite({**record.best_line, **(record.summary or {})}.get(key))


def _facts(group: Sequence[RunRecord]) -> dict[str, str | None]:
    """Return what the summaries say of runs besides their metrics."""
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
    """Return JavaScript as HTML may hold it: nothing that ends the element, control characters as escapes."""
    code = code.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    return re.sub(r"[\x00-\x08\x0b\x0e-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", code)


def compare_settings(groups: Mapping[str, Sequence[RunRecord]]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the settings that differ, by name with those of each group of runs, and those that all have in common."""
    flat = [
        [_flatten({k: v for k, v in r.settings.items() if k not in ("output", "left_open")}) for r in group]
        for group in groups.values()
    ]
    names = list(dict.fromkeys(name for group in flat for settings in group for name in settings))

    def of_group(group: list[dict[str, Any]], name: str) -> str:
        return ", ".join(dict.fromkeys(_setting_text(settings.get(name)) for settings in group))

    values = {name: [of_group(group, name) for group in flat] for name in names}
    differing = {name: row for name, row in values.items() if len(set(row)) > 1}
    return differing, {name: row[0] for name, row in values.items() if name not in differing}


def reproduce_commands(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Return, for each run, its name and the shell commands that train and measure it again."""
    return [(record.name, _commands(record)) for record in records]


def _commands(record: RunRecord) -> str:
    settings = record.settings
    names = names_of("data", "result", "free")
    recipe = {name: settings[name] for name in names if settings.get(name) not in (None, [], {})}
    name = record.name.replace("/", "-")
    file, folder = f"{name}.yaml", f"output/{name}"
    processes = settings.get("processes", 1)
    several = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else []
    train = ["accelerate", "launch", *several, "-m", "timm_sugar.training", "--recipe", file, "--output", folder]
    given = ("data", "label_column", "image_column")
    data = to_flags({name: settings[name] for name in given if settings.get(name)})
    commands = [train, *(["timm-sugar", command, folder, *data] for command in ("verify", "profile", "landscape"))]
    written = [f"cat > {shlex.quote(file)} <<'END_OF_RECIPE'", to_yaml(recipe) + "END_OF_RECIPE"]
    return "\n".join([*written, *map(shlex.join, commands)])


def class_tables(summary: Mapping[str, Any]) -> tuple[Table, Table | None]:
    """Return heads and rows of the accuracy by class, the lowest first, and of the confusion matrix, None without."""
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
    """Return heads and rows of the metrics by epoch, for people who cannot see the curves."""
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


def _landscape_charts(found: dict[str, dict[str, Any]], curve_of: dict[str, int]) -> list[charts.Chart]:
    losses = [loss for f in found.values() for row in f["loss"] for loss in row if loss is not None]
    if not losses:
        return []
    high = max(max(losses), 1e-6)
    low = min(max(min(losses), high * 1e-6), high / 1.1)
    each = enumerate(found.items())
    return [charts.landscape_chart(place, curve_of[name], name, f, low, high) for place, (name, f) in each]


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _setting_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
