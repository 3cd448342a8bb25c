"""A run, or several compared, on one self-contained HTML page."""

import importlib.util
import json
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import jinja2
import yaml
from markupsafe import Markup

import timm_sugar

from ..files import to_yaml, write_file
from ..settings import names_of
from . import report_charts as charts
from .landscape import summarise_landscape

_TEMPLATE = Path(__file__).with_name("report.html")
_SCRIPTS = {"digits": "digits", "tiny-imagenet": "tinyimagenet"}
_KEYS = {  # without which a file of a run cannot be shown
    "config.yaml": ("data", "model"),
    "metrics.jsonl": ("epoch",),
    "summary.json": (),
    "profile.json": ("images", "layers", "dead_units"),
    "landscape.json": ("settings", "axis", "loss", "done", "sharpness"),
}
_WORDS = ("activation", "state", "model")  # columns of the summary that hold no numbers
_COLOURS = 8  # of runs, in the template


def _percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class _Column(NamedTuple):
    """How a column of the summary is written, which of its values is the best, and whether that needs the same data."""

    text: Callable[[Any], str] = str
    better: Callable[[Iterable[float]], float] | None = None
    of_data: bool = False


_COLUMNS = {
    "test top-1": _Column(_percent, max, of_data=True),
    "val top-1": _Column(_percent, max, of_data=True),
    "dead units": _Column(_percent, min, of_data=True),
    "sparsity": _Column(_percent),
    "activation": _Column(),
    "state": _Column(),
    "test loss": _Column(_loss, min, of_data=True),
    "val loss": _Column(_loss, min, of_data=True),
    "images/s": _Column("{:,.0f}".format, max),
    "time": _Column(_duration, min),
    "best epoch": _Column(),
    "parameters": _Column("{:,}".format),
    "model": _Column(),
}


@dataclass(frozen=True)
class RunRecord:
    """What is in a run's folder.

    Attributes:
        name: What the run is called on the page.
        folder: Where it is.
        settings: config.yaml.
        metrics: The lines of metrics.jsonl; none before the first epoch has ended.
        summary: summary.json; None where the run is not finished.
        profile: profile.json, None where there is none.
        landscape: landscape.json, None where there is none.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None
    profile: dict[str, Any] | None
    landscape: dict[str, Any] | None

    @property
    def best_line(self) -> dict[str, Any]:
        """The metrics of the epoch that counts: the best so far by validation accuracy, or else the last."""
        validated = [line for line in self.metrics if charts.finite(line.get("val_top1")) is not None]
        if validated:
            return max(validated, key=lambda line: line["val_top1"])
        return self.metrics[-1] if self.metrics else {}

    @property
    def activation(self) -> str:
        """The activation in words, such as "SUGAR bsilu 1.67"."""
        line = self.summary or (self.metrics[-1] if self.metrics else self.settings)
        if line.get("surrogate"):
            alpha = line.get("alpha")
            return f"SUGAR {line['surrogate']}{'' if alpha is None else f' {alpha:g}'}"
        return self.settings.get("act_layer") or "the model's own"

    @property
    def landscape_is_complete(self) -> bool:
        """Whether there is a landscape with all its points, and finite losses among them."""
        found = self.landscape
        if found is None or found["done"] < len(found["axis"]) ** 2 or found["sharpness"] is None:
            return False
        return any(loss is not None for row in found["loss"] for loss in row)


def write_report(runs: Sequence[Path], output: Path) -> list[Path]:
    """Write a page about one or several runs, which loads nothing from anywhere, and pictures beside it.

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
    for module in ("matplotlib", "plotly"):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"reports need {module}: pip install 'timm-sugar[report]'")
    from .report_pictures import draw_pictures

    records = [read_run(folder, name) for folder, name in zip(runs, unique_names(runs), strict=True)]
    output.parent.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(records, output.with_suffix(""))
    write_file(output, render(records))
    return [output, *pictures]


def read_run(folder: Path, name: str) -> RunRecord:
    """Read what a run has written so far.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: one of its files cannot be read.
    """
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"{folder} is no run's folder: it has no config.yaml")

    def read(file: str, parse: Callable[[str], Any], kind: type) -> Any:
        path = folder / file
        if not path.is_file():
            return None
        try:
            content = parse(path.read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(content, kind):
            raise ValueError(f"{path} cannot be read: it is no {kind.__name__}")
        lines: Any = content if kind is list else [content]
        missing = [key for line in lines for key in _KEYS[file] if key not in line]
        if missing:
            raise ValueError(f"{path} cannot be read: it has no {missing[0]}")
        return content

    def parse_lines(text: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in text.splitlines()]
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("a line of it is no dict")
        return lines

    return RunRecord(
        name=name,
        folder=folder,
        settings=read("config.yaml", yaml.safe_load, dict),
        metrics=read("metrics.jsonl", parse_lines, list) or [],
        summary=read("summary.json", json.loads, dict),
        profile=read("profile.json", json.loads, dict),
        landscape=read("landscape.json", json.loads, dict),
    )


def unique_names(paths: Sequence[str | PurePath]) -> list[str]:
    """Return the last part of each path, or as many parts as tell them apart.

    Raises:
        ValueError: a path is there twice.
    """
    parts = [Path(path).resolve().parts if Path(path).exists() else PurePath(path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("the same folder is given twice")


def render(records: Sequence[RunRecord]) -> str:
    """Return the page about runs, in the order in which they are given."""
    from plotly.offline import get_plotlyjs

    from .report_pictures import surface_images

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
    rows = [_summary_values(record) for record in records]
    if all(record.summary for record in records):
        rows = [{**row, "state": None} for row in rows]
    heads = [head for head in _COLUMNS if any(row[head] is not None for row in rows)]
    cells: list[list[tuple[str, bool]]] = [[] for _ in records]
    for head in heads:
        column = _COLUMNS[head]
        values = [charts.finite(row[head]) if r.summary else None for r, row in zip(records, rows, strict=True)]
        known = {value for value in values if value is not None}
        comparable = len(known) > 1 and (same_data or not column.of_data)
        best = column.better(known) if column.better and comparable else None
        for run, (row, value) in enumerate(zip(rows, values, strict=True)):
            text = "–" if row[head] is None else column.text(row[head])  # noqa: RUF001
            cells[run].append((text, best is not None and value == best))
    return heads, cells


def _summary_values(record: RunRecord) -> dict[str, Any]:
    done, line = record.summary or {}, record.best_line
    found = {**line, **done}  # what was measured at the end wins
    unfinished = f"epoch {len(record.metrics)} of {record.settings.get('epochs', '?')}"
    seconds = sum(charts.finite(line.get("seconds")) or 0 for line in record.metrics)
    return {
        "activation": record.activation,
        "state": "finished" if record.summary else unfinished,
        "test top-1": found.get("test_top1"),
        "val top-1": found.get("val_top1"),
        "dead units": found.get("dead_units"),
        "sparsity": found.get("activation_sparsity"),
        "test loss": found.get("test_loss"),
        "val loss": line.get("val_loss"),
        "images/s": found.get("images_per_second"),
        "time": done.get("seconds", seconds or None),
        "best epoch": done.get("best_epoch", line.get("epoch")),
        "parameters": found.get("parameters"),
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
    file, folder, data = shlex.quote(f"{name}.yaml"), shlex.quote(f"output/{name}"), shlex.quote(str(settings["data"]))
    label = settings.get("label_column")
    data += f" --label-column {shlex.quote(label)}" if label else ""
    processes = settings.get("processes", 1)
    several = f"--multi_gpu --num_processes {processes} " if processes > 1 else ""
    script = _SCRIPTS.get(settings["data"], "cifar")
    return "\n".join(
        [
            f"cat > {file} <<'END_OF_RECIPE'",
            to_yaml(recipe) + "END_OF_RECIPE",
            f"accelerate launch {several}train/{script}.py --recipe {file} --output {folder}",
            f"timm-sugar verify {folder} --data {data}",
            f"timm-sugar profile {folder} --data {data}",
            f"timm-sugar landscape {folder} --data {data}",
        ]
    )


def epoch_table(metrics: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the metrics by epoch, for people who cannot see the curves."""
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "epoch": ("epoch", str),
        "train_loss": ("training loss", _loss),
        "val_loss": ("val loss", _loss),
        "val_top1": ("val top-1", _percent),
        "lr": ("learning rate", charts.number),
        "dead_units": ("dead units", _percent),
        "activation_sparsity": ("sparsity", _percent),
    }
    shown = {k: v for k, v in columns.items() if any(line.get(k) is not None for line in metrics)}
    rows = [["–" if line.get(k) is None else text(line[k]) for k, (_, text) in shown.items()] for line in metrics]  # noqa: RUF001
    return [head for head, _ in shown.values()], rows


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
