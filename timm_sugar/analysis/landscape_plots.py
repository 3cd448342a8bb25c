"""Pictures of loss landscapes, contours and surfaces of several models on one scale, in the manner of figure 5."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .plots import Figure, new_figure

try:
    from matplotlib.colors import LogNorm
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("plots need matplotlib: pip install 'timm-sugar[report]'", name="matplotlib") from error

_COLUMNS = 3
_LEVELS = 12


def landscape_contours(landscapes: Mapping[str, dict[str, Any]]) -> Figure:
    """Contours of the loss, one panel a model, all with the same logarithmic levels and axes.

    Args:
        landscapes: Name of the model -> what `timm_sugar.analysis.loss_landscape` returned, complete.
    """
    levels = _levels(landscapes)
    rows, columns = _shape(len(landscapes))
    figure, axes = new_figure(rows, columns, 1.4 + 3.4 * columns, 3.5, sharex=True, sharey=True)
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
    _hide_rest(axes, len(landscapes))
    bar = figure.colorbar(shade, ax=axes, label="cross-entropy (nats)", shrink=0.9, format=FuncFormatter(_number))
    bar.ax.yaxis.set_major_locator(FixedLocator(levels))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    figure.supxlabel("step along the first direction", fontsize="medium")
    figure.supylabel("step along the second direction", fontsize="medium")
    return figure


def landscape_surfaces(landscapes: Mapping[str, dict[str, Any]], highest: float | None = None) -> Figure:
    """The loss as a surface, one panel a model, all with the same axes.

    Args:
        landscapes: As for `landscape_contours`.
        highest: Where the axis of the loss ends; None for the highest loss of all.
    """
    rows, columns = _shape(len(landscapes))
    figure = Figure(figsize=(3.9 * columns + 0.4, 3.7 * rows), layout="constrained")
    highest = highest or highest_loss(landscapes.values())
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


def highest_loss(landscapes: Iterable[dict[str, Any]]) -> float:
    """The highest finite loss on several grids."""
    return max(float(np.nanmax(_loss(found))) for found in landscapes)


def _loss(found: dict[str, Any]) -> np.ndarray:
    return np.array(found["loss"], dtype=float)  # null becomes NaN


def _levels(landscapes: Mapping[str, dict[str, Any]]) -> list[float]:
    """Logarithmic levels over the losses of all models, six decades of them at most."""
    values = np.concatenate([_loss(found).ravel() for found in landscapes.values()])
    values = values[np.isfinite(values)]
    high = max(float(values.max()), 1e-6)
    low = min(max(float(values.min()), high * 1e-6), high / 1.1)
    return [float(level) for level in np.geomspace(low, high, _LEVELS)]


def _number(value: float, _: Any = None) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _shape(count: int) -> tuple[int, int]:
    return math.ceil(count / _COLUMNS), min(count, _COLUMNS)


def _hide_rest(axes: np.ndarray, count: int) -> None:
    for ax in axes.flat[count:]:
        ax.set_visible(False)
