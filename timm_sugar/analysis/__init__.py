"""What a network does: dead units and sparsity, and the loss around it."""

from .landscape import Sharpness, loss_landscape, random_directions, sharpness, summarise_landscape
from .units import UnitCounts, count_units

__all__ = [
    "Sharpness",
    "UnitCounts",
    "count_units",
    "loss_landscape",
    "random_directions",
    "sharpness",
    "summarise_landscape",
]
