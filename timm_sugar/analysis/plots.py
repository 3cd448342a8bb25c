"""Pictures of what a network does, in a style that survives colour blindness and grey print."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_file
from ..metrics import METRICS, Metric

try:
    from matplotlib import rc_context as rc_context
    from matplotlib.figure import Figure as Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("plots need matplotlib: pip install 'timm-sugar[report]'", name="matplotlib") from error

# Okabe and Ito's palette, safe for the common colour deficiencies; the dashes tell curves apart without colour.
BLACK, ORANGE, SKY, GREEN = "#000000", "#e69f00", "#56b4e9", "#009e73"
BLUE, RED, PURPLE = "#0072b2", "#d55e00", "#cc79a7"
# Beside colour, dashes, markers and hatches tell them apart, in grey print too.
STYLES = [
    (BLACK, "-", "o", ""),
    (BLUE, "--", "s", "////"),
    (ORANGE, "-.", "^", "...."),
    (GREEN, ":", "D", "xxxx"),
    (PURPLE, (0, (5, 1, 1, 1, 1, 1)), "v", "\\\\\\\\"),
    (SKY, (0, (1, 1)), "P", "++++"),
    (RED, (0, (8, 2)), "X", "oooo"),
    ("#8c6d00", (0, (3, 1, 1, 1)), "*", "****"),
]


def new_figure(rows: int, columns: int, width: float = 9.0, height: float = 3.2, **kwargs: Any) -> tuple[Figure, Any]:
    """Return a figure with a (rows, columns) array of axes; width in inches in all, height in inches a row."""
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for ax in axes.flat:
        ax.grid(color="0.88", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and as PDF; `path` has no suffix. A half-written file never appears."""
    for suffix, metadata in ((".png", {}), (".pdf", {"CreationDate": None})):
        content = io.BytesIO()
        figure.savefig(content, format=suffix[1:], dpi=110, metadata=metadata)
        write_file(path.with_name(path.name + suffix), content.getvalue())


def metric_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Sequence[Metric] | None = None) -> Figure:
    """Metrics by epoch, a panel for each metric and a curve for each run.

    Args:
        runs: Name of each run -> the lines of its metrics.jsonl.
        metrics: What is shown; None for the metrics that have a chart.
    """
    shown = [metric for metric in METRICS if metric.chart] if metrics is None else metrics
    columns = min(3, len(shown))
    figure, axes = new_figure(math.ceil(len(shown) / columns), columns, 11 / 3 * columns, 3)
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for ax, metric in zip(axes.flat, shown, strict=False):
        for i, (name, lines) in enumerate(runs.items()):
            colour, dashes, marker, _ = STYLES[i % len(STYLES)]
            points = [
                (line["epoch"], metric.scale * line[metric.key]) for line in lines if line.get(metric.key) is not None
            ]
            if points:
                style = {"color": colour, "linestyle": dashes, "marker": marker if len(points) <= 40 else ""}
                ax.plot(*zip(*points, strict=True), label=name, markersize=4, **style)
        ax.set(title=metric.axis, xlabel="epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
    if len(runs) > 1:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def activation_ridges(profiles: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Figures 4 and 10: for each layer, how many of its elements are active for which share of the images.

    All ridges have one scale: their height goes with the square root of the share of the elements, without which a
    bin that holds nearly all of them would hide the others. At the right stands the share of the units that are dead.

    Args:
        profiles: Label of each panel -> content of a profile.json, or `Profile.to_dict()`.
    """
    rows = max(len(found["layers"]) for found in profiles.values())
    figure, axes = new_figure(1, len(profiles), width=1 + 4.2 * len(profiles), height=max(2.6, 0.9 + 0.3 * rows))
    for place, (ax, (name, found)) in enumerate(zip(axes[0], profiles.items(), strict=True)):
        colour = STYLES[place % len(STYLES)][0]
        layers = found["layers"]
        ax.grid(False)
        for row, layer in enumerate(layers):
            counts, bins = layer["histogram"], len(layer["histogram"])
            edges = [100 * i / bins for i in range(bins + 1)]
            heights = [row - 2 * math.sqrt(count / sum(counts)) for count in counts]
            style = {"step": "post", "zorder": row}
            ax.fill_between(edges, row, [*heights, heights[-1]], facecolor="white", **style)
            ax.fill_between(edges, row, [*heights, heights[-1]], facecolor=colour, alpha=0.35, **style)
            ax.step(edges, [*heights, heights[-1]], where="post", color=colour, linewidth=0.9, zorder=row)
            ax.text(102, row, f"{100 * layer['dead'] / layer['units']:.0f}%", va="bottom", fontsize=7)
        ax.text(102, -1.9, "dead", fontsize=8, va="bottom")
        ax.set(title=name, xlim=(0, 100), ylim=(len(layers) - 0.9, -1.9))
        step = math.ceil(len(layers) / 20)
        ax.set_yticks(range(0, len(layers), step), [str(i + 1) for i in range(0, len(layers), step)])
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
    axes[0, 0].set_ylabel("layer, input at the top")
    figure.supxlabel("images for which an element is active (%)", fontsize=10)
    return figure


def dead_units_by_layer(profiles: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Share of dead units of each layer, a bar for each profile.

    Args:
        profiles: As for `activation_ridges`; layers are matched by their place in the forward pass.
    """
    rows = max(len(found["layers"]) for found in profiles.values())
    figure, axes = new_figure(1, 1, width=max(5.5, 1.5 + 0.16 * rows * (1 + len(profiles))), height=3.6)
    ax = axes[0, 0]
    width = 0.8 / len(profiles)
    for place, (name, found) in enumerate(profiles.items()):
        colour, _, _, hatch = STYLES[place % len(STYLES)]
        x = [row + 1 + (place - (len(profiles) - 1) / 2) * width for row in range(len(found["layers"]))]
        shares = [100 * layer["dead"] / layer["units"] for layer in found["layers"]]
        label = f"{name}: {100 * found['dead_units']:.1f}% of all"
        ax.bar(x, shares, width, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5, label=label)
    ax.set(xlabel="layer, in the order of the forward pass", ylabel="dead units (%)", xlim=(0.4, rows + 0.6))
    ax.set_ylim(0, max(1.0, ax.get_ylim()[1]))
    step = math.ceil(rows / 20)
    ax.set_xticks(range(1, rows + 1, step))
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=len(profiles), frameon=False)
    return figure


def gradient_norms_by_layer(norms: Sequence[Mapping[str, Any]]) -> Figure:
    """Gradient norm of each layer's weights with SUGAR and with ReLU, on a logarithmic axis.

    Args:
        norms: What `gradient_norms` returns.
    """
    figure, axes = new_figure(1, 1, width=max(5.5, 1.5 + 0.3 * len(norms)), height=3.4)
    ax = axes[0, 0]
    layers = range(1, len(norms) + 1)
    for place, (key, label) in enumerate((("relu", "ReLU"), ("sugar", "SUGAR"))):
        colour, dashes, marker, _ = STYLES[place]
        values = [row[key] or math.nan for row in norms]  # no logarithm where nothing arrives
        ax.plot(layers, values, color=colour, linestyle=dashes, marker=marker, markersize=4, label=label)
    ax.set(xlabel="convolution or linear layer, from the input", ylabel="norm of the gradient", yscale="log")
    ax.legend(frameon=False)
    return figure
