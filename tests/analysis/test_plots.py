"""Pictures: what is drawn, by the data of the lines and bars, and that they are written as PNG and PDF."""

from statistics import stdev

import pytest
import torch
from torch import nn

from timm_sugar.analysis import plots, profile
from timm_sugar.analysis.palette import PALETTE, assign_styles
from timm_sugar.metrics import find_metric


def test_profiles_by_layer(tmp_path):
    torch.manual_seed(0)
    found = profile(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU()), [torch.randn(50, 4)])
    dead = found.to_dict()
    dead["layers"][1]["dead"] = 4
    profiles = {"before": dead, "after": found.to_dict()}
    figure = plots.dead_units_by_layer({name: [found] for name, found in profiles.items()})
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0, 80, 0, found.layers[1].dead * 20]
    plots.save(figure, tmp_path / "dead")
    figure = plots.activation_ridges(profiles)
    assert [ax.get_title() for ax in figure.axes] == ["before", "after"]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["0%", "80%", "dead"]
    lines = [path.vertices[:, 1] for path in figure.axes[0].collections[0].get_paths()]
    assert min(lines[0]) == pytest.approx(-2 * (max(found.layers[0].histogram) / 8) ** 0.5)
    plots.save(figure, tmp_path / "ridges")


def test_dead_units_of_seeds_and_none():
    layers = [{"name": "conv1", "units": 10, "dead": 1}, {"name": "conv2", "units": 10, "dead": 0}]
    more = [{"name": "conv1", "units": 10, "dead": 3}, {"name": "conv2", "units": 10, "dead": 0}]
    seeds = [{"layers": layers, "dead_units": 0.05}, {"layers": more, "dead_units": 0.15}]
    ax = plots.dead_units_by_layer({"sugar": seeds}, assign_styles(["sugar_bsilu"])).axes[0]
    assert [bar.get_height() for bar in ax.patches] == [20, 0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["conv1", "conv2"]
    ends = [segment[:, 1].tolist() for segment in ax.containers[0].lines[2][0].get_segments()]
    assert ends == [[0, 100], [0, 0]]  # 20 ± 127, cut off at what is possible
    assert not ax.texts
    none = [{"layers": layers[1:], "dead_units": 0.0}]
    (text,) = plots.dead_units_by_layer({"sugar": none}).axes[0].texts
    assert text.get_text() == "no unit is dead in any layer"


def test_styles():
    relu, sugar, again, odd = assign_styles(["relu", "sugar_bsilu", "bsilu", "tanh"])
    assert (relu, sugar) == (PALETTE["relu"], PALETTE["bsilu"])
    assert len({relu, sugar, again, odd}) == 4
    assert assign_styles(["", "nelu"])[1] == PALETTE["nelu"] != assign_styles(["", "nelu"])[0]
    assert len(assign_styles([""] * 20)) == 20
    assert assign_styles(["tanh"])[0] != PALETTE["relu"]
    for key in ("colour", "on_dark", "dashes", "marker", "hatch", "symbol", "glyph"):
        assert len({getattr(style, key) for style in PALETTE.values()}) == len(PALETTE), key


def test_gradient_norms(tmp_path):
    norms = [{"name": "a", "sugar": 0.5, "relu": 0.0}, {"name": "b", "sugar": 1.0, "relu": 1.0}]
    figure = plots.gradient_norms_by_layer(norms)
    relu, sugar = (line.get_ydata().tolist() for line in figure.axes[0].lines)
    assert (str(relu[0]), relu[1], sugar) == ("nan", 1.0, [0.5, 1.0])
    plots.save(figure, tmp_path / "norms")


def test_metrics_by_epoch():
    lines = [dict(epoch=i, train_loss=1 / i, val_loss=2 / i, val_top1=i / 10, lr=None) for i in range(1, 5)]
    shown = [find_metric(key) for key in ("val_loss", "val_top1")]
    figure = plots.metric_curves({"whole": [lines], "begun": [lines[:1]]}, shown)
    loss, accuracy = figure.axes
    assert [line.get_ydata().tolist() for line in loss.lines] == [[2.0, 1.0, 2 / 3, 0.5], [2.0]]
    assert accuracy.lines[0].get_ydata().tolist() == pytest.approx([10, 20, 30, 40])
    assert accuracy.get_title() == "validation top-1 accuracy (%)"
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in loss.lines}) == 2
    for ax in figure.axes:
        assert all(tick == int(tick) for tick in ax.get_xticks())
    several = [[dict(line, val_top1=line["val_top1"] + seed / 10) for line in lines] for seed in range(3)]
    (ax,) = plots.metric_curves({"seeds": several}, shown[1:], assign_styles(["nelu"])).axes
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([20, 30, 40, 50])
    assert ax.lines[0].get_color() == PALETTE["nelu"].colour
    edges = ax.collections[0].get_paths()[0].vertices
    assert edges[:, 1].max() == pytest.approx(50 + 24.84, abs=0.01)
    assert edges[:, 1].min() == 0  # not 20 - 24.84, which no accuracy is
    (ax,) = plots.metric_curves({"seeds": several}, shown[1:], spread=stdev).axes
    assert ax.collections[0].get_paths()[0].vertices[:, 1].max() == pytest.approx(60)
    for count in (1, 2, 3):
        (ax,) = plots.metric_curves({"begun": [lines[:count]]}, shown[1:]).axes
        ticks = [tick for tick in ax.get_xticks() if ax.get_xlim()[0] <= tick <= ax.get_xlim()[1]]
        assert ticks == list(range(1, count + 1))
    panels = plots.metric_curves({"whole": [lines]}).axes
    assert [ax.get_title() for ax in panels] == [
        "validation top-1 accuracy (%)", "training loss (nats)", "validation loss (nats)"
    ]  # fmt: skip
    assert [len(ax.lines) for ax in panels] == [1, 1, 1]  # none of what no run has measured, or only as None
