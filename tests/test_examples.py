"""The examples in docstrings: each gives what it says, and every public function has one."""

import doctest
import importlib

import pytest
import timm
import torch

import timm_sugar
from timm_sugar import surrogates

MODULES = [
    "surrogates", "functional", "layers", "gradients", "monitor", "convert", "init", "models._pretrained",
    "data.sources", "data.evaluation", "analysis.units", "analysis.profiles", "analysis.seeds", "analysis.landscape",
    "training.config", "training.command",
]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, monkeypatch):
    monkeypatch.setattr(surrogates, "_SURROGATES", dict(surrogates._SURROGATES))
    module = importlib.import_module(f"timm_sugar.{name}")
    names = vars(module) | {"timm": timm, "torch": torch, "timm_sugar": timm_sugar}
    found = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("name", timm_sugar.__all__)
def test_every_public_name_shows_an_example(name):
    assert ">>>" in (getattr(timm_sugar, name).__doc__ or ""), name
