"""Pictures of what a network does, in a style that survives colour blindness and grey print."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..files import write_file
from ..metrics import METRICS, Metric
from .palette import Style, assign_styles
from .seeds import band, interval, mean_by_epoch

try:
    from matplotlib import rc_context as rc_context
    from matplotlib.figure import Figure as Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("plots need matplotlib: pip install 'timm-sugar[report]'", name="matplotlib") from error


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


def metric_curves(
    runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    metrics: Sequence[Metric] | None = None,
    styles: Sequence[Style] | None = None,
    spread: Callable[[Sequence[float]], float | None] = interval,
    log_scale: bool = False,
) -> Figure:
    """Metrics by epoch, a panel for each metric and a curve for each run, or for the mean of several seeds.

    Args:
        runs: Name of each curve -> for each seed, the lines of its metrics.jsonl. Epochs that not all seeds have are
            left out.
        metrics: What is shown; None for those that have a chart and that some run has measured.
        styles: Of the curves; None for those of activations that have none of their own.
        spread: Half the width of the band around a mean, from the values of the seeds: `interval`, or `stdev`.
        log_scale: Draw losses on a logarithmic axis.
    """
    lines = [line for seeds in runs.values() for run in seeds for line in run]
    measured = {key for line in lines for key, value in line.items() if value is not None}
    shown = [m for m in METRICS if m.chart and m.key in measured] if metrics is None else metrics
    styles = styles or assign_styles([""] * len(runs))
    columns = min(3, len(shown))
    figure, axes = new_figure(math.ceil(len(shown) / columns), columns, 11 / 3 * columns, 3)
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for ax, metric in zip(axes.flat, shown, strict=False):
        for style, (name, seeds) in zip(styles, runs.items(), strict=True):
            points = mean_by_epoch(seeds, metric.key, metric.scale, spread)
            if not points:
                continue
            epochs, means, _ = zip(*points, strict=True)
            if ends := band(points, metric.limits):
                ax.fill_between(*zip(*ends, strict=True), color=style.colour, alpha=0.18, linewidth=0)
            marks = {"marker": style.marker, "markersize": 4, "markevery": math.ceil(len(epochs) / 40)}
            ax.plot(epochs, means, color=style.colour, linestyle=style.dashes, label=name, **marks)
        ax.set(title=metric.axis, xlabel="epoch")
        if log_scale and metric.unit == "nats":
            ax.set_yscale("log")
        _whole_numbers(ax)
    if len(runs) > 1:
        handles: dict[str, Any] = {}
        for ax in axes.flat:
            handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def _whole_numbers(ax: Any) -> None:
    """Put the ticks of the x axis at whole numbers alone, of a single point too."""
    low, high = ax.dataLim.intervalx
    if low == high:
        ax.set_xlim(low - 0.5, high + 0.5)
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def activation_ridges(profiles: Mapping[str, Mapping[str, Any]], styles: Sequence[Style] | None = None) -> Figure:
    """Figures 4 and 10: for each layer, how many of its elements are active for which share of the images.

    All ridges have one scale: their height goes with the square root of the share of the elements, without which a
    bin that holds nearly all of them would hide the others. At the right stands the share of the units that are dead.

    Args:
        profiles: Label of each panel -> content of a profile.json, or `Profile.to_dict()`.
        styles: Of the panels; None for those of activations that have none of their own.
    """
    styles = styles or assign_styles([""] * len(profiles))
    rows = max(len(found["layers"]) for found in profiles.values())
    first = [layer["name"] for layer in next(iter(profiles.values()))["layers"]]
    columns = min(3, len(profiles))
    height = max(2.6, 0.9 + 0.3 * rows)
    figure, axes = new_figure(math.ceil(len(profiles) / columns), columns, width=1.4 + 4.2 * columns, height=height)
    for ax in axes.flat[len(profiles) :]:
        ax.set_visible(False)
    for ax, (colour, *_), (name, found) in zip(axes.flat, styles, profiles.items(), strict=False):
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
        names = [layer["name"] for layer in layers]
        ax.set_yticks(range(len(layers)), [] if ax not in axes[:, 0] and names == first else names, fontsize=7)
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
    for row in axes:
        row[0].set_ylabel("layer, input at the top")
    figure.supxlabel("images for which an element is active (%)", fontsize=10)
    return figure


def dead_units_by_layer(
    profiles: Mapping[str, Sequence[Mapping[str, Any]]], styles: Sequence[Style] | None = None
) -> Figure:
    """Share of dead units of each layer, a bar for each profile, or for the mean of several seeds, with its interval.

    Args:
        profiles: Label of each bar -> for each seed, the content of a profile.json; layers are matched by their place
            in the forward pass.
        styles: Of the bars; None for those of activations that have none of their own.
    """
    styles = styles or assign_styles([""] * len(profiles))
    layers = [layer["name"] for layer in next(iter(profiles.values()))[0]["layers"]]
    same = all([x["name"] for x in found["layers"]] == layers for seeds in profiles.values() for found in seeds)
    rows = max(len(seeds[0]["layers"]) for seeds in profiles.values())
    figure, axes = new_figure(1, 1, width=max(5.5, 1.5 + 0.16 * rows * (1 + len(profiles))), height=3.9)
    ax = axes[0, 0]
    width = 0.8 / len(profiles)
    for place, (style, (name, seeds)) in enumerate(zip(styles, profiles.items(), strict=True)):
        columns = zip(*(found["layers"] for found in seeds), strict=True)
        shares = [[100 * layer["dead"] / layer["units"] for layer in column] for column in columns]
        x = [row + 1 + (place - (len(profiles) - 1) / 2) * width for row in range(len(shares))]
        label = f"{name}: {100 * fmean(found['dead_units'] for found in seeds):.1f}% of all"
        drawn = {"color": style.colour, "hatch": style.hatch, "edgecolor": "white", "linewidth": 0.5, "label": label}
        if len(seeds) > 1:
            ends = band([(0, fmean(column), interval(column)) for column in shares], (0, 100))
            errors = [(fmean(c) - low, high - fmean(c)) for c, (_, low, high) in zip(shares, ends, strict=True)]
            drawn |= {"yerr": [*zip(*errors, strict=True)], "error_kw": {"linewidth": 1}, "capsize": 2}
        ax.bar(x, [fmean(column) for column in shares], width, **drawn)
    if not any(layer["dead"] for seeds in profiles.values() for found in seeds for layer in found["layers"]):
        ax.text(0.5, 0.5, "no unit is dead in any layer", transform=ax.transAxes, ha="center", color="0.3")
    ax.set(xlabel="layer, in the order of the forward pass", ylabel="dead units (%)", xlim=(0.4, rows + 0.6))
    ax.set_ylim(0, max(1.0, ax.get_ylim()[1]))
    _layer_ticks(ax, layers if same else [str(row + 1) for row in range(rows)])
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=len(profiles), frameon=False)
    return figure


def gradient_norms_by_layer(norms: Sequence[Mapping[str, Any]], surrogate: str = "bsilu") -> Figure:
    """Gradient norm of each layer's weights with SUGAR and with ReLU, on a logarithmic axis.

    Args:
        norms: What `gradient_norms` returns.
        surrogate: That of SUGAR, which gives its curve a colour.
    """
    figure, axes = new_figure(1, 1, width=max(5.5, 1.5 + 0.3 * len(norms)), height=3.8)
    ax = axes[0, 0]
    layers = range(1, len(norms) + 1)
    for style, key, label in zip(assign_styles(["relu", surrogate]), ("relu", "sugar"), ("ReLU", "SUGAR"), strict=True):
        values = [row[key] or math.nan for row in norms]  # no logarithm where nothing arrives
        drawn = {"linestyle": style.dashes, "marker": style.marker, "markersize": 4, "label": label}
        ax.plot(layers, values, color=style.colour, **drawn)
    ax.set(xlabel="convolution or linear layer, from the input", ylabel="norm of the gradient", yscale="log")
    _layer_ticks(ax, [row["name"] for row in norms])
    ax.legend(frameon=False)
    return figure


def _layer_ticks(ax: Any, names: Sequence[str]) -> None:
    """Name the layers, or every second of them and so on, from 1 on the x axis."""
    shown = range(0, len(names), math.ceil(len(names) / 40))
    upright = max(map(len, names)) > 3
    ax.set_xticks([place + 1 for place in shown], [names[place] for place in shown], fontsize=8)
    ax.tick_params(axis="x", rotation=90 if upright else 0)
