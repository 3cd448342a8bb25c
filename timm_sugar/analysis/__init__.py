"""What a network does: dead units, activation profiles and gradient norms."""

from .profiles import LayerProfile, Profile, gradient_norms, profile, revived_units
from .units import LayerCounts, UnitCounts, count_units

__all__ = [
    "LayerCounts",
    "LayerProfile",
    "Profile",
    "UnitCounts",
    "count_units",
    "gradient_norms",
    "profile",
    "revived_units",
]
