"""Data of the report's interactive charts, in plotly.js's format. report.html defines their style.

A chart has an `id`, `title`, `description`, `data` and `layout`; `meta` of each trace is the number of its curve.
"""

import html
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..metrics import METRICS, with_unit
from .landscape import loss_range, summarise_landscape
from .run import finite
from .seeds import band, dead_by_layer, interval, mean_by_epoch

Chart = dict[str, Any]
Profiles = Mapping[str, Sequence[dict[str, Any]]]  # name of each curve -> the profile.json of each seed that has one
_MOST_TICKS = 24  # layer names on an axis


def curve_charts(metrics: Mapping[str, Sequence[Sequence[dict[str, Any]]]]) -> list[Chart]:
    """Line charts by epoch of the metrics that have one; for several seeds the mean, and a band for its interval.

    Args:
        metrics: Name of each curve -> for each seed, the lines of its metrics.jsonl.
    """
    charts = []
    for title in dict.fromkeys(metric.chart for metric in METRICS if metric.chart):
        shown = [metric for metric in METRICS if metric.chart == title]
        traces, last = [], []
        for run, (name, seeds) in enumerate(metrics.items()):
            for metric in shown:
                points = mean_by_epoch(seeds, metric)
                if points:
                    part = metric.label if len(shown) > 1 else ""
                    dash = "dot" if part and metric.split == "train" else "solid"
                    traces += [*_band(run, band(points, metric.limits)), _line(run, name, part, dash, points)]
                    last.append(f"{name}{', ' + part if part else ''}: {points[-1][1]:.4g}")
        if traces:
            axis = with_unit(title.lower(), shown[0].unit)
            description = f"Line chart of {axis} by epoch. At the end: {'; '.join(last)}."
            layout = _axes("epoch", axis)
            epochs = max(epoch for trace in traces for epoch in trace["x"])
            layout["xaxis"] |= {"tickformat": "d"} | ({"dtick": 1} if epochs <= 10 else {})
            if len({y for trace in traces for y in trace["y"]}) == 1:  # else plotly.js uses the range -1 to 1
                layout["yaxis"] |= {"rangemode": "tozero"}
            charts.append(_chart(title.lower().replace(" ", "-"), title, description, traces, layout))
    return charts


def dead_unit_totals(profiles: Profiles) -> list[str]:
    """Return a text for each profile: how many units are dead."""
    return [
        f"{name}: {_mean_text([sum(layer['dead'] for layer in found['layers']) for found in seeds])} of "
        f"{sum(layer['units'] for layer in seeds[0]['layers']):,} units"
        for name, seeds in profiles.items()
        if seeds
    ]


def dead_unit_charts(profiles: Profiles) -> list[Chart]:
    """Dead units of each layer, one bar per run, or for the mean of several seeds; no chart if no unit is dead."""
    traces = []
    for run, (name, seeds) in enumerate(profiles.items()):
        if not seeds:
            continue
        means, reach = dead_by_layer(seeds)
        columns = zip(*(found["layers"] for found in seeds), strict=True)
        trace: Chart = {
            "type": "bar",
            "meta": run,
            "name": html.escape(name),
            "x": [*range(1, len(means) + 1)],
            "y": means,
            "text": [
                f"{html.escape(layers[0]['name'])}: {_mean_text([x['dead'] for x in layers])} of {layers[0]['units']}"
                for layers in columns
            ],
        }
        if reach:
            down, up = reach
            trace["error_y"] = {"array": up, "arrayminus": down}
        traces.append(trace)
    if not any(share for trace in traces for share in trace["y"]):
        return []
    layout = _axes("layer, in the order of the forward pass", "dead units (%)", height=380) | {"barmode": "group"}
    layout["yaxis"] |= {"rangemode": "tozero"}
    layout["xaxis"] |= _layer_ticks([found["layers"] for seeds in profiles.values() for found in seeds])
    description = f"Bar chart of dead units by layer. {'; '.join(dead_unit_totals(profiles))}."
    return [_chart("dead-by-layer", "Dead units by layer", description, traces, layout)]


def gradient_charts(profiles: Profiles) -> list[Chart]:
    """Norm of the gradient of each layer's weights with SUGAR and, on the same weights and images, with ReLU.

    For several seeds it shows the mean; no chart if no profile has gradients.
    """
    traces, layers = [], []
    for run, (name, seeds) in enumerate(profiles.items()):
        measured = [found["gradients"] for found in seeds if found.get("gradients")]
        layers += measured
        for kind, label, dash in (("sugar", "SUGAR", "solid"), ("relu", "ReLU", "dot")):
            columns: list[Any] = [[finite(row[kind]) for row in rows] for rows in zip(*measured, strict=True)]
            means = [None if None in column else fmean(column) for column in columns]
            points = [(place, norm or None, None) for place, norm in enumerate(means, 1)]  # no logarithm of 0
            if any(means):
                traces.append(_line(run, name, label, dash, points))
    if not traces:
        return []
    layout = _axes("layer with weights, from the input", "norm of the gradient", height=380)
    layout["yaxis"] |= {"type": "log", "tickformat": "~g"}
    layout["xaxis"] |= _layer_ticks(layers)
    description = "Line chart of the gradient's norm by layer, with SUGAR (solid) and with ReLU (dotted)."
    return [_chart("gradients", "Gradient by layer: SUGAR solid, ReLU dotted", description, traces, layout)]


def _layer_ticks(networks: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Ticks of a layer axis: the names if all networks have the same ones, else whole numbers."""
    names, *others = [[layer["name"] for layer in layers] for layers in networks]
    count = max(map(len, networks))
    if any(other != names for other in others):
        return {"tickformat": "d"} | ({"dtick": 1} if count <= 10 else {})
    places = range(0, count, math.ceil(count / _MOST_TICKS))
    return {
        "tickvals": [place + 1 for place in places],
        "ticktext": [html.escape(names[place]) for place in places],
        "autotickangles": [0, -90],
    }


def _mean_text(counts: Sequence[int]) -> str:
    """Return a count, or the mean of several with its interval."""
    spread = interval(counts)
    return f"{counts[0]:,}" if spread is None else f"{fmean(counts):,.1f} ± {spread:,.1f}"


def activation_charts(profiles: Mapping[str, dict[str, Any]], curve_of: Mapping[str, int]) -> list[Chart]:
    """Heat map of how often the elements of each layer are active; its rows are the histograms of figures 4 and 10.

    Args:
        profiles: Name of each run -> the content of its profile.json.
        curve_of: Name of each run -> the number of its curve.
    """
    charts = []
    for place, (name, found) in enumerate(profiles.items()):
        layers = found["layers"]
        shares = [[count / max(1, sum(layer["histogram"])) for count in layer["histogram"]] for layer in layers]
        bins = len(shares[0])
        trace = {
            "type": "heatmap",
            "meta": curve_of[name],
            "x": [round(100 * (i + 0.5) / bins, 2) for i in range(bins)],
            "y": list(range(1, len(layers) + 1)),
            "z": [[round(math.sqrt(share), 4) for share in row] for row in shares],  # else a full bin hides the rest
            "customdata": [
                [[html.escape(layer["name"]), round(100 * share, 2)] for share in row]
                for layer, row in zip(layers, shares, strict=True)
            ],
        }
        layout = _axes("active for this share of the images (%)", "layer", min(620, 190 + 20 * len(layers)))
        layout["yaxis"] |= {"autorange": "reversed"} | _layer_ticks([layers])
        description = (
            f"Heat map: for each of {len(layers)} layers of {name}, which share of its elements is active for which "
            f"share of the images. {100 * found['dead_elements']:.1f}% of all elements are never active."
        )
        charts.append(_chart(f"activation-{place}", name, description, [trace], layout))
    return charts


def landscape_charts(landscapes: Mapping[str, dict[str, Any]], curve_of: Mapping[str, int]) -> list[Chart]:
    """Contours of the loss around each model, all in the same colours.

    Args:
        landscapes: Name of each run -> the content of its landscape.json, complete.
        curve_of: As for `activation_charts`.
    """
    if not landscapes:
        return []
    low, high = loss_range(landscapes.values())
    first, last = math.log10(low), math.log10(high)
    ticks = [first + (last - first) * i / 6 for i in range(7)]
    charts = []
    for place, (name, found) in enumerate(landscapes.items()):
        trace = {
            "type": "contour",
            "meta": curve_of[name],
            "x": found["axis"],
            "y": found["axis"],
            "z": [[None if v is None else round(math.log10(max(v, low)), 5) for v in row] for row in found["loss"]],
            "customdata": [
                [[loss, None if top1 is None else 100 * top1] for loss, top1 in zip(*rows, strict=True)]
                for rows in zip(found["loss"], found["top1"], strict=True)
            ],
            "zmin": first,
            "zmax": last,
            "contours": {"start": first, "end": last, "size": (last - first) / 12},
            "colorbar": {"tickvals": ticks, "ticktext": [f"{10**tick:.2g}" for tick in ticks]},
        }
        values = [v for row in found["loss"] for v in row if v is not None]
        description = (
            f"Contour plot of the loss around {name}: {number(summarise_landscape(found)['centre_loss'])} nats in the "
            f"middle, from {number(min(values))} to {number(max(values))} on the grid."
        )
        layout = _axes("first direction", "second direction", height=430)
        layout["xaxis"] |= {"constrain": "domain"}
        layout["yaxis"] |= {"constrain": "domain", "scaleanchor": "x"}
        charts.append(_chart(f"landscape-{place}", name, description, [trace], layout))
    return charts


def number(value: float | None) -> str:
    """Format a number with 4 digits; a dash for None."""
    return "–" if value is None else f"{value:.4g}"  # noqa: RUF001


Point = tuple[float, float | None, float | None]  # x, mean, and half the width of its interval


def _line(run: int, name: str, part: str, dash: str, points: Sequence[Point]) -> dict[str, Any]:
    label = html.escape(f"{name}, {part}" if part else name)
    return {
        "type": "scatter",
        "meta": run,
        "name": label,
        "x": [x for x, _, _ in points],
        "y": [y for _, y, _ in points],
        "customdata": ["" if half is None else f" ± {half:.3g}" for _, _, half in points],
        "line": {"dash": dash},
    }


def _band(run: int, ends: Sequence[tuple[float, float, float]]) -> list[dict[str, Any]]:
    """The area of the intervals around a line, if there are any."""
    if not ends:
        return []
    outline = [(x, low) for x, low, _ in ends] + [(x, high) for x, _, high in reversed(ends)]
    x, y = zip(*outline, strict=True)
    return [{"type": "scatter", "fill": "toself", "meta": run, "x": x, "y": y}]


def _axes(x: str, y: str, height: int = 320) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}, "height": height}


def _chart(chart_id: str, title: str, description: str, data: list[dict[str, Any]], layout: dict[str, Any]) -> Chart:
    return {"id": chart_id, "title": title, "description": description, "data": data, "layout": layout}
