"""The interactive charts of the report, as plotly.js takes them. Colours, which depend on the theme, are set there."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..metrics import METRICS, with_unit
from .run import finite

Chart = dict[str, Any]
# As plotly.js and as the legend names them.
SYMBOLS = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "x": "✖", "cross": "✚", "star": "★"}
_SYMBOLS = tuple(SYMBOLS)


def curve_charts(metrics: Mapping[str, Sequence[dict[str, Any]]]) -> list[Chart]:
    """Line charts of the metrics that have one, by epoch.

    Args:
        metrics: Name of each run -> the lines of its metrics.jsonl.

    Returns:
        Charts that have anything to show, each with `id`, `title`, `description`, `data` and `layout`. Traces carry the
        number of their run in `meta`.
    """
    charts = []
    for title in dict.fromkeys(metric.chart for metric in METRICS if metric.chart):
        shown = [metric for metric in METRICS if metric.chart == title]
        traces, last = [], []
        for run, (name, lines) in enumerate(metrics.items()):
            for metric in shown:
                values = [(line["epoch"], finite(line.get(metric.key))) for line in lines]
                points = [(epoch, metric.scale * value) for epoch, value in values if value is not None]
                if points:
                    part = metric.label if len(shown) > 1 else ""
                    dash = "dot" if part and metric.split == "train" else "solid"
                    traces.append(_line(run, name, part, dash, points))
                    last.append(f"{name}{', ' + part if part else ''}: {points[-1][1]:.4g}")
        if traces:
            axis = with_unit(title.lower(), shown[0].unit)
            description = f"Line chart of {axis} by epoch. At the end: {'; '.join(last)}."
            layout = _axes("epoch", axis)
            if max(epoch for trace in traces for epoch in trace["x"]) <= 10:
                layout["xaxis"] |= {"dtick": 1}
            charts.append(_chart(title.lower().replace(" ", "-"), title, description, traces, layout))
    return charts


def dead_unit_chart(profiles: Mapping[int, tuple[str, dict[str, Any]]]) -> Chart:
    """Dead units of each layer, a bar for each run.

    Args:
        profiles: Number of a run -> its name and the content of its profile.json.
    """
    traces = []
    for run, (name, found) in profiles.items():
        layers = found["layers"]
        traces.append(
            {
                "type": "bar",
                "meta": run,
                "name": html.escape(name),
                "x": [*range(1, len(layers) + 1)],
                "y": [100 * layer["dead"] / layer["units"] for layer in layers],
                "text": [f"{html.escape(layer['name'])}: {layer['dead']} of {layer['units']}" for layer in layers],
                "textposition": "none",
                "hovertemplate": "%{text} dead (%{y:.1f}%)",
            }
        )
    totals = "; ".join(
        f"{name}: {sum(layer['dead'] for layer in found['layers'])} of "
        f"{sum(layer['units'] for layer in found['layers'])} units"
        for name, found in profiles.values()
    )
    layout = _axes("layer, in the order of the forward pass", "dead units (%)") | {"barmode": "group"}
    layout["yaxis"] |= {"rangemode": "tozero"}
    if max(len(found["layers"]) for _, found in profiles.values()) <= 10:
        layout["xaxis"] |= {"dtick": 1}
    return _chart(
        "dead-by-layer", "Dead units by layer", f"Bar chart of dead units by layer. {totals}.", traces, layout
    )


def gradient_chart(profiles: Mapping[int, tuple[str, dict[str, Any]]]) -> Chart | None:
    """Norm of the gradient of each layer's weights with SUGAR and, on the same weights and images, with ReLU.

    Args:
        profiles: As for `dead_unit_chart`.

    Returns:
        None where no profile has gradients.
    """
    traces = []
    for run, (name, found) in profiles.items():
        for kind, dash in (("sugar", "solid"), ("relu", "dot")):
            norms = [finite(row[kind]) or None for row in found.get("gradients") or []]  # no logarithm of 0
            if any(norms):
                label = {"sugar": "SUGAR", "relu": "ReLU"}[kind]
                traces.append(_line(run, name, label, dash, list(enumerate(norms, 1))))
    if not traces:
        return None
    layout = _axes("layer with weights, from the input", "norm of the gradient")
    layout["yaxis"] |= {"type": "log", "exponentformat": "power"}
    description = "Line chart of the gradient's norm by layer, with SUGAR (solid) and with ReLU (dotted)."
    return _chart("gradients", "Gradient by layer: SUGAR solid, ReLU dotted", description, traces, layout)


def activation_chart(run: int, name: str, found: dict[str, Any]) -> Chart:
    """How often the elements of each layer are active: the histograms of figures 4 and 10 as rows of a heat map.

    Args:
        run: Number of the run.
        name: Its name.
        found: The content of its profile.json.
    """
    layers = found["layers"]
    shares = [[count / max(1, sum(layer["histogram"])) for count in layer["histogram"]] for layer in layers]
    bins = len(shares[0])
    trace = {
        "type": "heatmap",
        "meta": run,
        "x": [round(100 * (i + 0.5) / bins, 2) for i in range(bins)],
        "y": list(range(1, len(layers) + 1)),
        "z": [[round(math.sqrt(share), 4) for share in row] for row in shares],  # else a full bin hides all others
        "customdata": [[[html.escape(layer["name"]), round(100 * share, 2)] for share in row]
                       for layer, row in zip(layers, shares, strict=True)],
        "hovertemplate": "%{customdata[0]}: active for about %{x}% of the images:"
        " %{customdata[1]}% of the elements<extra></extra>",
        "zmin": 0,
        "zmax": 1,
        "colorscale": "Cividis",
        "colorbar": {
            "title": {"text": "% of elements", "side": "right"},
            "tickvals": [math.sqrt(share) for share in (0, 0.05, 0.2, 0.5, 1)],
            "ticktext": ["0", "5", "20", "50", "100"],
            "thickness": 12,
        },
    }  # fmt: skip
    layout = _axes("active for this share of the images (%)", "layer") | {"height": min(620, 190 + 20 * len(layers))}
    layout["yaxis"] |= {"autorange": "reversed", "dtick": 1 if len(layers) <= 20 else 5}
    description = (
        f"Heat map: for each of {len(layers)} layers of {name}, which share of its elements is active for which share "
        f"of the images. {100 * found['dead_elements']:.1f}% of all elements are never active."
    )
    return _chart(f"activation-{run}", name, description, [trace], layout)


def landscape_chart(run: int, name: str, found: dict[str, Any], low: float, high: float) -> Chart:
    """Contours of the loss around a model.

    Args:
        run: Number of the run.
        name: Its name.
        found: The content of its landscape.json.
        low: Loss at which the colours begin, the same for all runs.
        high: Loss at which they end.
    """
    first, last = math.log10(low), math.log10(high)
    ticks = [first + (last - first) * i / 6 for i in range(7)]
    trace = {
        "type": "contour",
        "meta": run,
        "x": found["axis"],
        "y": found["axis"],
        "z": [[None if v is None else round(math.log10(max(v, low)), 5) for v in row] for row in found["loss"]],
        "customdata": [
            [[loss, None if top1 is None else 100 * top1] for loss, top1 in zip(*rows, strict=True)]
            for rows in zip(found["loss"], found["top1"], strict=True)
        ],
        "hovertemplate": "step %{x}, %{y}<br>loss %{customdata[0]:.4g}<br>accuracy %{customdata[1]:.1f}%"
        "<extra></extra>",
        "zmin": first,
        "zmax": last,
        "autocontour": False,
        "contours": {"start": first, "end": last, "size": (last - first) / 12},
        "line": {"width": 0.5},
        "colorscale": "Viridis",
        "reversescale": True,
        "colorbar": {
            "title": {"text": "cross-entropy (nats)", "side": "bottom"},
            "tickvals": ticks,
            "ticktext": [f"{10**tick:.2g}" for tick in ticks],
            "thickness": 12,
            "orientation": "h",
            "y": -0.2,
            "yanchor": "top",
        },
    }
    centre = found["loss"][len(found["loss"]) // 2][len(found["loss"]) // 2]
    values = [v for row in found["loss"] for v in row if v is not None]
    description = (
        f"Contour plot of the loss around {name}: {number(centre)} nats in the middle, from {number(min(values))} to "
        f"{number(max(values))} on the grid."
    )
    layout = _axes("first direction", "second direction") | {"height": 430}
    layout["xaxis"] |= {"constrain": "domain"}
    layout["yaxis"] |= {"constrain": "domain", "scaleanchor": "x"}
    return _chart(f"landscape-{run}", name, description, [trace], layout)


def number(value: float | None) -> str:
    """A number for a person to read: 4 digits, or a dash where there is none."""
    return "–" if value is None else f"{value:.4g}"  # noqa: RUF001


def _line(run: int, name: str, part: str, dash: str, points: Sequence[tuple[float, float | None]]) -> dict[str, Any]:
    label = html.escape(f"{name}, {part}" if part else name)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "meta": run,
        "name": label,
        "x": [epoch for epoch, _ in points],
        "y": [value for _, value in points],
        "line": {"dash": dash, "width": 2},
        "marker": {"symbol": _SYMBOLS[run % len(_SYMBOLS)], "size": 7, "maxdisplayed": 20},
        "hovertemplate": "%{y:.5g}",
    }


def _axes(x: str, y: str) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": x}, "automargin": True},
        "yaxis": {"title": {"text": y}, "automargin": True},
        "margin": {"l": 56, "r": 12, "t": 12, "b": 48},
        "height": 320,
        "showlegend": False,
        "hovermode": "closest",
    }


def _chart(chart_id: str, title: str, description: str, data: list[dict[str, Any]], layout: dict[str, Any]) -> Chart:
    return {"id": chart_id, "title": title, "description": description, "data": data, "layout": layout}
