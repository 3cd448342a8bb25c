"""Colours, dashes, markers and hatches: an activation has the same style in pictures, reports and documentation."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Style(NamedTuple):
    """How a curve or bar is drawn.

    Attributes:
        colour: Colour on a white background: in pictures and on light pages.
        on_dark: Colour on dark pages.
        dashes: matplotlib's `linestyle`; it distinguishes curves in greyscale too.
        marker: matplotlib's name of the marker.
        hatch: matplotlib's hatch.
        symbol: plotly.js's name of the marker.
        glyph: The marker as a character.
    """

    colour: str
    on_dark: str
    dashes: Any
    marker: str
    hatch: str
    symbol: str
    glyph: str


# Hues after Okabe and Ito, distinguishable with common colour deficiencies, with a contrast of 3 to 1 or more.
PALETTE = {
    "relu": Style("#000000", "#e6e9ec", "-", "o", "", "circle", "●"),
    "bsilu": Style("#0072b2", "#5fb4f0", "--", "s", "////", "square", "■"),
    "nelu": Style("#c24a00", "#ff8f4d", "-.", "^", "....", "triangle-up", "▲"),
    "elu": Style("#007a5a", "#3ccfa0", ":", "D", "xxxx", "diamond", "◆"),
    "gelu": Style("#a3487e", "#e79ac0", (0, (5, 1, 1, 1, 1, 1)), "v", "\\\\\\\\", "triangle-down", "▼"),
    "silu": Style("#6a3d9a", "#bda2ff", (0, (1, 1)), "P", "++++", "cross", "✚"),
    "selu": Style("#8a6500", "#e3b23c", (0, (8, 2)), "X", "oooo", "x", "✖"),
    "mish": Style("#0b8494", "#4dd0d8", (0, (3, 1, 1, 1)), "*", "****", "star", "★"),
    "leaky_relu": Style("#777777", "#a3adb8", (0, (4, 3)), "h", "--", "hexagon", "⬢"),
}


def assign_styles(activations: Sequence[str]) -> list[Style]:
    """Return a style for each curve: that of its activation, or, if another curve has it, an unused one.

    Args:
        activations: Activation of each curve: "relu", "sugar_bsilu" or a surrogate's name, which share a style; any
            other name has no own style.
    """
    names = [name.removeprefix("sugar_") for name in activations]
    free = [style for name, style in PALETTE.items() if name not in names]
    given: list[Style] = []
    for name in names:
        own = PALETTE.get(name)
        if own is None or own in given:
            own = free.pop() if free else [*PALETTE.values()][len(given) % len(PALETTE)]
        given.append(own)
    return given
