"""The pictures beside a report, for print, and those of landscapes on its page."""

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .landscape_plots import highest_loss, landscape_contours, landscape_surfaces
from .plots import Figure, activation_ridges, dead_units_by_layer, metric_curves, rc_context, save
from .run import RunRecord

_INK, _PANE = "#e6e9ec", (1.0, 1.0, 1.0, 0.06)
_ON_DARK: dict[Any, Any] = dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
)
_ON_DARK |= dict.fromkeys((f"axes3d.{axis}axis.panecolor" for axis in "xyz"), _PANE) | {"grid.color": "#4a525b"}


def draw_pictures(records: Sequence[RunRecord], path: Path) -> list[Path]:
    """Draw what the runs have: PATH_curves, _dead_units, _activation_profile, _landscape_contours, _landscape_surface.

    Returns:
        The PNG files; a PDF is beside each.
    """
    figures: dict[str, Figure] = {}
    if any(record.metrics for record in records):
        figures["curves"] = metric_curves({record.name: record.metrics for record in records})
    profiles = {record.name: record.profile for record in records if record.profile is not None}
    if profiles:
        figures["dead_units"] = dead_units_by_layer(profiles)
        figures["activation_profile"] = activation_ridges(profiles)
    landscapes = {r.name: r.landscape for r in records if r.landscape is not None and r.landscape_is_complete}
    if landscapes:
        figures["landscape_contours"] = landscape_contours(landscapes)
        figures["landscape_surface"] = landscape_surfaces(landscapes)
    written = []
    for name, figure in figures.items():
        base = path.with_name(f"{path.name}_{name}")
        save(figure, base)
        written.append(base.with_name(base.name + ".png"))
    return written


def surface_images(landscapes: Mapping[int, dict[str, Any]]) -> dict[int, tuple[str, str]]:
    """Draw each landscape as a surface, all on one scale.

    Returns:
        For each, a PNG for a light page and one for a dark page, in base64.
    """
    highest = highest_loss(landscapes.values()) if landscapes else None

    def draw(found: dict[str, Any], style: dict[Any, Any]) -> str:
        content = io.BytesIO()
        with rc_context(style):
            landscape_surfaces({"": found}, highest).savefig(content, format="png", dpi=110, transparent=True)
        return b64encode(content.getvalue()).decode()

    return {run: (draw(found, {}), draw(found, _ON_DARK)) for run, found in landscapes.items()}
