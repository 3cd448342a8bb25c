"""Plots of a network's behaviour, in a style that is readable with colour blindness and in greyscale.

`styles` are those of the curves, bars or panels; None gives the styles of activations without an own one.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ..files import write_file
from ..metrics import METRICS, Metric
from .landscape import loss_range
from .palette import Style, assign_styles
from .seeds import band, dead_by_layer, interval, mean_by_epoch

try:
    from matplotlib import rc_context as rc_context
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure as Figure
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("plots need matplotlib: pip install 'timm-sugar[report]'", name="matplotlib") from error


ON_DARK: dict[Any, Any] = {  # for a picture on a dark page
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#e6e9ec"),
    **dict.fromkeys((f"axes3d.{axis}axis.panecolor" for axis in "xyz"), (1.0, 1.0, 1.0, 0.06)),
    "grid.color": "#4a525b",
}


def new_figure(rows: int, columns: int, width: float = 9.0, height: float = 3.2, **kwargs: Any) -> tuple[Figure, Any]:
    """Return a figure with a (rows, columns) array of axes; total width and height per row in inches."""
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for ax in axes.flat:
        ax.grid(color="0.88", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _new_panels(count: int, width: float, height: float, margin: float = 0.0, **kwargs: Any) -> tuple[Figure, Any]:
    """Return a figure with `count` panels, three per row; width and height per panel in inches."""
    columns = min(3, count)
    figure, axes = new_figure(math.ceil(count / columns), columns, margin + width * columns, height, **kwargs)
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and as PDF, atomically; `path` has no suffix."""
    for suffix, metadata in ((".png", {}), (".pdf", {"CreationDate": None})):
        content = io.BytesIO()
        figure.savefig(content, format=suffix[1:], dpi=110, metadata=metadata)
        write_file(path.with_name(path.name + suffix), content.getvalue())


def metric_curves(
    runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    metrics: Sequence[Metric] | None = None,
    styles: Sequence[Style] | None = None,
    spread: Callable[[Sequence[float]], float | None] = interval,
) -> Figure:
    """Metrics by epoch, one panel per metric and one curve per run, or for the mean of several seeds.

    Args:
        runs: Name of each curve -> for each seed, the lines of its metrics.jsonl. Epochs that some seeds do not have
            are skipped.
        metrics: Metrics to show; None for those that have a chart and that some run has measured.
        spread: Function from the values of the seeds to half the width of the band: `interval` or `stdev`.
    """
    lines = [line for seeds in runs.values() for run in seeds for line in run]
    measured = {key for line in lines for key, value in line.items() if value is not None}
    shown = [m for m in METRICS if m.chart and m.key in measured] if metrics is None else metrics
    styles = styles or assign_styles([""] * len(runs))
    figure, axes = _new_panels(len(shown), 11 / 3, 3)
    for ax, metric in zip(axes.flat, shown, strict=False):
        for style, (name, seeds) in zip(styles, runs.items(), strict=True):
            points = mean_by_epoch(seeds, metric, spread)
            if not points:
                continue
            epochs, means, _ = zip(*points, strict=True)
            if ends := band(points, metric.limits):
                ax.fill_between(*zip(*ends, strict=True), color=style.colour, alpha=0.18, linewidth=0)
            marks = {"marker": style.marker, "markersize": 4, "markevery": math.ceil(len(epochs) / 40)}
            ax.plot(epochs, means, color=style.colour, linestyle=style.dashes, label=name, **marks)
        ax.set(title=metric.axis, xlabel="epoch")
        _whole_numbers(ax)
    if len(runs) > 1:
        handles: dict[str, Any] = {}
        for ax in axes.flat:
            handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def _whole_numbers(ax: Any) -> None:
    """Restrict the ticks of the x axis to whole numbers, also for a single point."""
    low, high = ax.dataLim.intervalx
    if low == high:
        ax.set_xlim(low - 0.5, high + 0.5)
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def activation_ridges(profiles: Mapping[str, Mapping[str, Any]], styles: Sequence[Style] | None = None) -> Figure:
    """Figures 4 and 10: for each layer, a histogram of its elements by the share of images that activate them.

    All ridges have the same scale: their height is proportional to the square root of the share of the elements, so
    that a bin with nearly all elements does not hide the others. The share of dead units is shown at the right.

    Args:
        profiles: Label of each panel -> content of a profile.json, or `Profile.to_dict()`.
    """
    styles = styles or assign_styles([""] * len(profiles))
    rows = max(len(found["layers"]) for found in profiles.values())
    first = [layer["name"] for layer in next(iter(profiles.values()))["layers"]]
    figure, axes = _new_panels(len(profiles), 4.2, max(2.6, 0.9 + 0.3 * rows), margin=1.4)
    for ax, (colour, *_), (name, found) in zip(axes.flat, styles, profiles.items(), strict=False):
        layers = found["layers"]
        ax.grid(False)
        for row, layer in enumerate(layers):
            counts, bins = layer["histogram"], len(layer["histogram"])
            edges = [100 * i / bins for i in range(bins + 1)]
            heights = [row - 2 * math.sqrt(count / sum(counts)) for count in [*counts, counts[-1]]]
            for face in ("white", (colour, 0.35)):
                ax.fill_between(edges, row, heights, facecolor=face, step="post", zorder=row)
            ax.step(edges, heights, where="post", color=colour, linewidth=0.9, zorder=row)
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
    """Share of dead units of each layer, one bar per profile, or for the mean of several seeds, with its interval.

    Args:
        profiles: Label of each bar -> for each seed, the content of a profile.json; layers are matched by their order
            in the forward pass.
    """
    styles = styles or assign_styles([""] * len(profiles))
    layers = [layer["name"] for layer in next(iter(profiles.values()))[0]["layers"]]
    same = all([x["name"] for x in found["layers"]] == layers for seeds in profiles.values() for found in seeds)
    rows = max(len(seeds[0]["layers"]) for seeds in profiles.values())
    figure, axes = new_figure(1, 1, width=max(5.5, 1.5 + 0.16 * rows * (1 + len(profiles))), height=3.9)
    ax = axes[0, 0]
    width = 0.8 / len(profiles)
    for place, (style, (name, seeds)) in enumerate(zip(styles, profiles.items(), strict=True)):
        means, reach = dead_by_layer(seeds)
        x = [row + 1 + (place - (len(profiles) - 1) / 2) * width for row in range(len(means))]
        label = f"{name}: {100 * fmean(found['dead_units'] for found in seeds):.1f}% of all"
        drawn = {"color": style.colour, "hatch": style.hatch, "edgecolor": "white", "linewidth": 0.5, "label": label}
        if reach:
            drawn |= {"yerr": reach, "error_kw": {"linewidth": 1}, "capsize": 2}
        ax.bar(x, means, width, **drawn)
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
        norms: The result of `gradient_norms`.
        surrogate: The surrogate of SUGAR, which determines the colour of its curve.
    """
    figure, axes = new_figure(1, 1, width=max(5.5, 1.5 + 0.3 * len(norms)), height=3.8)
    ax = axes[0, 0]
    layers = range(1, len(norms) + 1)
    for style, key, label in zip(assign_styles(["relu", surrogate]), ("relu", "sugar"), ("ReLU", "SUGAR"), strict=True):
        values = [row[key] or math.nan for row in norms]  # log axis: no point for a zero gradient
        drawn = {"linestyle": style.dashes, "marker": style.marker, "markersize": 4, "label": label}
        ax.plot(layers, values, color=style.colour, **drawn)
    ax.set(xlabel="convolution or linear layer, from the input", ylabel="norm of the gradient", yscale="log")
    _layer_ticks(ax, [row["name"] for row in norms])
    ax.legend(frameon=False)
    return figure


def _layer_ticks(ax: Any, names: Sequence[str]) -> None:
    """Label the layers on the x axis, starting at 1, or every second layer and so on."""
    shown = range(0, len(names), math.ceil(len(names) / 40))
    upright = max(map(len, names)) > 3
    ax.set_xticks([place + 1 for place in shown], [names[place] for place in shown], fontsize=8)
    ax.tick_params(axis="x", rotation=90 if upright else 0)


def landscape_contours(landscapes: Mapping[str, dict[str, Any]]) -> Figure:
    """Contours of the loss as in figure 5, one panel per model, all with the same logarithmic levels and axes.

    Args:
        landscapes: Name of the model -> complete result of `timm_sugar.analysis.loss_landscape`.
    """
    levels = np.geomspace(*loss_range(landscapes.values()), 12).tolist()
    figure, axes = _new_panels(len(landscapes), 3.4, 3.5, margin=1.4, sharex=True, sharey=True)
    norm = LogNorm(levels[0], levels[-1])
    for ax, (name, found) in zip(axes.flat, landscapes.items(), strict=False):
        loss = np.ma.masked_invalid(_loss(found))
        axis = found["axis"]
        shade = ax.contourf(axis, axis, loss, levels, norm=norm, cmap="viridis_r", extend="both")
        lines = ax.contour(axis, axis, loss, levels, colors="white", linewidths=0.5)
        outline = [withStroke(linewidth=2, foreground="white")]
        for text in ax.clabel(lines, fmt=_number, fontsize=7, colors="black"):
            text.set_path_effects(outline)
        ax.plot(0, 0, "+", color="black", markersize=9, markeredgewidth=1.6, path_effects=outline)
        ax.set(title=name, aspect="equal")
        ax.grid(visible=False)
    bar = figure.colorbar(shade, ax=axes, label="cross-entropy (nats)", shrink=0.9, format=FuncFormatter(_number))
    bar.ax.yaxis.set_major_locator(FixedLocator(levels))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    figure.supxlabel("step along the first direction", fontsize="medium")
    figure.supylabel("step along the second direction", fontsize="medium")
    return figure


def landscape_surfaces(landscapes: Mapping[str, dict[str, Any]], highest: float | None = None) -> Figure:
    """The loss as a surface, one panel per model, all with the same axes.

    Args:
        landscapes: As for `landscape_contours`.
        highest: Upper end of the loss axis; None for the highest loss of all.
    """
    highest = highest or loss_range(landscapes.values())[1]
    rows, columns = math.ceil(len(landscapes) / 3), min(len(landscapes), 3)
    figure = Figure(figsize=(3.9 * columns + 0.4, 3.7 * rows), layout="constrained")
    for place, (name, found) in enumerate(landscapes.items(), 1):
        ax = figure.add_subplot(rows, columns, place, projection="3d")
        x, y = np.meshgrid(found["axis"], found["axis"])
        style = {"cmap": "viridis_r", "vmin": 0, "vmax": highest, "linewidth": 0.15, "edgecolor": "white"}
        ax.plot_surface(x, y, _loss(found), rstride=1, cstride=1, **style)
        ax.set(title=name, xlabel="first direction", ylabel="second direction", zlim=(0, highest))
        ax.set_zlabel("cross-entropy (nats)")
        ax.view_init(elev=28, azim=-55)
        ax.set_box_aspect(None, zoom=0.86)
        ax.locator_params(axis="x", nbins=5)
        ax.locator_params(axis="y", nbins=5)
    return figure


def _loss(found: dict[str, Any]) -> np.ndarray:
    return np.array(found["loss"], dtype=float)  # null becomes NaN


def _number(value: float, _: Any = None) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"
