"""The pictures beside a report, for print, and those of landscapes on its page."""

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .landscape_plots import highest_loss, landscape_contours, landscape_surfaces
from .palette import assign_styles
from .plots import Figure, activation_ridges, dead_units_by_layer, metric_curves, rc_context, save
from .run import RunRecord
from .seeds import counted

_INK, _PANE = "#e6e9ec", (1.0, 1.0, 1.0, 0.06)
ON_DARK: dict[Any, Any] = dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
)
ON_DARK |= dict.fromkeys((f"axes3d.{axis}axis.panecolor" for axis in "xyz"), _PANE) | {"grid.color": "#4a525b"}


def draw_pictures(groups: Mapping[str, Sequence[RunRecord]], path: Path) -> list[Path]:
    """Draw what the runs have: PATH_curves, _dead_units, _activation_profile, _landscape_contours, _landscape_surface.

    Args:
        groups: Name of each curve -> its run, or the runs that differ from it in their seed alone.
        path: What the names of the pictures begin with.

    Returns:
        The PNG files; a PDF is beside each.
    """
    figures: dict[str, Figure] = {}
    records = [record for group in groups.values() for record in group]
    styles = dict(zip(groups, assign_styles([group[0].look for group in groups.values()]), strict=True))
    begun = {name: [r.metrics for r in counted(group) if r.metrics] for name, group in groups.items()}
    begun = {name: lines for name, lines in begun.items() if lines}
    if begun:
        figures["curves"] = metric_curves(begun, styles=[styles[name] for name in begun])
    profiles = {name: [r.profile for r in group if r.profile is not None] for name, group in groups.items()}
    profiles = {name: found for name, found in profiles.items() if found}
    if profiles:
        figures["dead_units"] = dead_units_by_layer(profiles, [styles[name] for name in profiles])
        each = {r.name: (r.profile, styles[name]) for name, group in groups.items() for r in group if r.profile}
        named = {name: profile for name, (profile, _) in each.items()}
        figures["activation_profile"] = activation_ridges(named, [style for _, style in each.values()])
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


def surface_images(landscapes: Mapping[str, dict[str, Any]]) -> dict[str, tuple[str, str]]:
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

    return {run: (draw(found, {}), draw(found, ON_DARK)) for run, found in landscapes.items()}
