"""The report: one run, or several compared, on a self-contained HTML page."""

import importlib.util
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import timm_sugar

from ..files import to_yaml, write_file
from ..metrics import METRICS, Metric
from ..settings import names_of, to_flags
from . import report_charts as charts
from .landscape import summarise_landscape
from .report_pictures import draw_pictures, surface_images
from .run import RunRecord, finite, read_run, unique_names

_TEMPLATE = Path(__file__).with_name("report.html")
_WORDS = ("activation", "state", "model")  # columns of the summary that hold no numbers
_COLOURS = 8  # of runs, in the template
_NOTHING = "–"  # noqa: RUF001


def write_report(runs: Sequence[Path], output: Path) -> list[Path]:
    """Write a self-contained HTML page about one or several runs, and pictures beside it.

    Runs that are not finished are shown as far as they are.

    Args:
        runs: Folders that training has written to.
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

    records = [read_run(folder, name) for folder, name in zip(runs, unique_names(runs), strict=True)]
    output.parent.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(records, output.with_suffix(""))
    write_file(output, render(records))
    return [output, *pictures]


def render(records: Sequence[RunRecord]) -> str:
    """Return the page about runs, in the order in which they are given."""
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    profiles = {i: (r.name, r.profile) for i, r in enumerate(records) if r.profile is not None}
    complete = {i: r for i, r in enumerate(records) if r.landscape_is_complete}
    landscapes = {i: r.landscape for i, r in complete.items() if r.landscape is not None}
    sections = {
        "curves": charts.curve_charts({r.name: r.metrics for r in records}),
        "dead": list(filter(None, [charts.dead_unit_chart(profiles), charts.gradient_chart(profiles)]))
        if profiles
        else [],
        "activation": [charts.activation_chart(i, name, found) for i, (name, found) in profiles.items()],
        "landscape": _landscape_charts(complete),
    }
    differing, common = compare_settings(records)
    return template.render(
        title=f"Run {records[0].name}" if len(records) == 1 else f"{len(records)} runs compared",
        runs=records,
        summary=summary_table(records),
        sections=sections,
        charts=[chart for section in sections.values() for chart in section],
        profiles=profiles,
        landscapes={i: summarise_landscape(found) for i, found in landscapes.items()},
        surfaces=surface_images(landscapes),
        symbols=list(charts.SYMBOLS.values()),
        colours=_COLOURS,
        words=_WORDS,
        epochs={r.name: epoch_table(r.metrics) for r in records if r.metrics},
        differing=differing,
        common=common,
        commands=reproduce_commands(records),
        number=charts.number,
        version=timm_sugar.__version__,
        plotly=Markup(_inline_script(get_plotlyjs())),
    )


def summary_table(records: Sequence[RunRecord]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Return the heads of the columns that any run has values for, and for each run its cells.

    A cell is its text, and whether it is the best of its column. None is marked where all are equal, where only one
    finished run has a value, or where values cannot be compared because the runs have other data.
    """
    same_data = len({tuple(r.settings.get(name) for name in names_of("data")) for r in records}) == 1
    measured = [{metric.label: _value(record, metric.key) for metric in METRICS if metric.column} for record in records]
    others = [_facts(record) for record in records]
    if all(record.summary for record in records):
        others = [row | {"state": None} for row in others]
    metrics = {m.label: m for m in METRICS if m.column and any(row[m.label] is not None for row in measured)}
    rest = [head for head in others[0] if any(row[head] is not None for row in others)]
    cells: list[list[tuple[str, bool]]] = [[] for _ in records]
    for head, metric in metrics.items():
        values = [row[head] if record.summary else None for record, row in zip(records, measured, strict=True)]
        known = {value for value in values if value is not None}
        comparable = metric.better is not None and len(known) > 1 and (same_data or metric.split == "train")
        best = (max if metric.better == "higher" else min)(known) if comparable else None
        for row, value, cell in zip(measured, values, cells, strict=True):
            cell.append((_text(metric, row[head]), best is not None and value == best))
    for facts, cell in zip(others, cells, strict=True):
        cell.extend((facts[head] or _NOTHING, False) for head in rest)
    return [*metrics, *rest], cells


def _value(record: RunRecord, key: str) -> float | None:
    """Return a metric of the epoch that counts, or of the whole run where it is finished."""
    if key == "seconds" and not record.summary:
        return sum(finite(line.get(key)) or 0 for line in record.metrics) or None
    return finite({**record.best_line, **(record.summary or {})}.get(key))


def _facts(record: RunRecord) -> dict[str, str | None]:
    """Return what the summary says of a run besides its metrics."""
    done = record.summary or {}
    epoch = done.get("best_epoch", record.best_line.get("epoch"))
    return {
        "activation": record.activation,
        "state": "finished" if done else f"epoch {len(record.metrics)} of {record.settings.get('epochs', '?')}",
        "best epoch": None if epoch is None else str(epoch),
        "parameters": f"{done['parameters']:,}" if "parameters" in done else None,
        "model": record.settings.get("model"),
    }


def _inline_script(code: str) -> str:
    """Return JavaScript as HTML may hold it: nothing that ends the element, control characters as escapes."""
    code = code.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    return re.sub(r"[\x00-\x08\x0b\x0e-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", code)


def compare_settings(records: Sequence[RunRecord]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the settings that differ, by name with the value of each run, and those that all have in common."""
    flat = [_flatten({k: v for k, v in r.settings.items() if k not in ("output", "left_open")}) for r in records]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    values = {name: [_setting_text(settings.get(name)) for settings in flat] for name in names}
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


def epoch_table(metrics: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the metrics by epoch, for people who cannot see the curves."""
    shown = [metric for metric in METRICS if any(line.get(metric.key) is not None for line in metrics)]
    rows = [[str(line["epoch"]), *(_text(metric, line.get(metric.key)) for metric in shown)] for line in metrics]
    return ["epoch", *(metric.label for metric in shown)], rows


def _text(metric: Metric, value: float | None) -> str:
    return _NOTHING if value is None else metric.text(value)


def _landscape_charts(records: dict[int, RunRecord]) -> list[charts.Chart]:
    found = {i: record.landscape for i, record in records.items() if record.landscape is not None}
    losses = [loss for f in found.values() for row in f["loss"] for loss in row if loss is not None]
    if not losses:
        return []
    high = max(max(losses), 1e-6)
    low = min(max(min(losses), high * 1e-6), high / 1.1)
    return [charts.landscape_chart(i, records[i].name, f, low, high) for i, f in found.items()]


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
