"""SUGAR for timm: networks with ReLU in the forward pass and a smooth surrogate gradient in the backward pass."""

from . import _program  # noqa: F401  # before the slow imports
from .convert import convert, to_relu
from .functional import forward_gradient_injection, sugar
from .gradients import check_gradients
from .layers import Sugar, register_surrogate
from .models import create_model
from .monitor import DeadUnitMonitor
from .surrogates import list_surrogates

__version__ = "0.1.0.dev0"
__all__ = [
    "DeadUnitMonitor",
    "Sugar",
    "check_gradients",
    "convert",
    "create_model",
    "forward_gradient_injection",
    "list_surrogates",
    "register_surrogate",
    "sugar",
    "to_relu",
]
