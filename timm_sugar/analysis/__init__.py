"""Analysis of a network: dead units, activation profiles, gradient norms, and the loss landscape."""

from .landscape import Sharpness, loss_landscape, random_directions, sharpness, summarise_landscape
from .profiles import LayerProfile, Profile, gradient_norms, profile, revived_units
from .units import LayerCounts, UnitCounts, count_units

__all__ = [
    "LayerCounts",
    "LayerProfile",
    "Profile",
    "Sharpness",
    "UnitCounts",
    "count_units",
    "gradient_norms",
    "loss_landscape",
    "profile",
    "random_directions",
    "revived_units",
    "sharpness",
    "summarise_landscape",
]
