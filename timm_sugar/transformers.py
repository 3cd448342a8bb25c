"""Importing this registers the activations with transformers, as in ``hidden_act="sugar_bsilu"``."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from .layers import BSiLU, NeLU, Sugar, activation_registries
from .surrogates import list_surrogates


def is_activation(value: Any, accept: Callable[[nn.Module], bool]) -> bool:
    """Whether `value` is a name in transformers' activation table whose module `accept` accepts."""
    return isinstance(value, str) and value in ACT2FN and accept(ACT2FN[value])


def _register(surrogate: str) -> None:
    ACT2FN[f"sugar_{surrogate}"] = (Sugar, {"surrogate": surrogate})


activation_registries.append(_register)
for _name in [*list_surrogates(), "swish"]:
    _register(_name)
ACT2FN.update(bsilu=BSiLU, nelu=NeLU)
