"""What counts as an activation: kinds, places, gates, and what a forward calls by name."""

from functools import partial

import timm
import torch
import torch.nn.functional as F
from torch import nn

from timm_sugar import Sugar, sugar
from timm_sugar.activations import called_activations, calls_summary, find_activations, kind_of, name_of


def test_kinds():
    for value, kind in (
        (nn.ReLU(), "relu"),
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (partial(F.gelu, approximate="tanh"), "gelu"),
        (timm.layers.create_act_layer("swish"), "silu"),
        (Sugar(), "sugar"),
        (sugar, "sugar"),
        (nn.PReLU(), "prelu"),
        (nn.Sigmoid(), None),
        (nn.Linear(1, 1), None),
        (len, None),
        ("relu", None),
    ):
        assert kind_of(value) == kind, value


def test_a_class_of_that_name_with_parameters_or_parts_is_no_activation():
    class ReLU(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part = part

    assert kind_of(ReLU(nn.Identity())) is None
    assert kind_of(ReLU(nn.Parameter(torch.ones(1)))) is None
    assert kind_of(ReLU(None)) == "relu"


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        return F.relu(self.act(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.body, self.tail = SqueezeExcite(), nn.Sequential(nn.Linear(2, 2), nn.SiLU()), F.elu

    def forward(self, x):
        return F.relu(self.tail(self.body(self.gate(x))).relu()) + F.leaky_relu(x)


def test_places_and_calls():
    model = nn.Sequential(Net(), Net())
    found = [(a.name, a.kind, name_of(a.value), a.gate) for a in find_activations(model) if a.kind]
    one = [("tail", "elu", "elu", False), ("gate.act", "relu", "ReLU", True), ("body.1", "silu", "SiLU", False)]
    assert found == [(f"{i}.{name}", *rest) for i in (0, 1) for name, *rest in one]
    assert called_activations(model) == {"0": ["leaky_relu", "relu"], "1": ["leaky_relu", "relu"]}
    called = called_activations(model, ["relu"])
    assert called == {"0": ["relu"], "1": ["relu"]}
    assert calls_summary(model, called) == "relu in the forward of Net (2 times, first in '0')"
