"""Pictures: what is drawn, by the data of the lines and bars, and that they are written as PNG and PDF."""

import pytest
import torch
from torch import nn

from timm_sugar.analysis import plots, profile
from timm_sugar.metrics import find_metric


def test_profiles_by_layer(tmp_path):
    torch.manual_seed(0)
    found = profile(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU()), [torch.randn(50, 4)])
    dead = found.to_dict()
    dead["layers"][1]["dead"] = 4
    profiles = {"before": dead, "after": found.to_dict()}
    figure = plots.dead_units_by_layer(profiles)
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0, 80, 0, found.layers[1].dead * 20]
    plots.save(figure, tmp_path / "dead")
    figure = plots.activation_ridges(profiles)
    assert [ax.get_title() for ax in figure.axes] == ["before", "after"]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["0%", "80%", "dead"]
    lines = [path.vertices[:, 1] for path in figure.axes[0].collections[0].get_paths()]
    assert min(lines[0]) == pytest.approx(-2 * (max(found.layers[0].histogram) / 8) ** 0.5)
    plots.save(figure, tmp_path / "ridges")


def test_gradient_norms(tmp_path):
    norms = [{"name": "a", "sugar": 0.5, "relu": 0.0}, {"name": "b", "sugar": 1.0, "relu": 1.0}]
    figure = plots.gradient_norms_by_layer(norms)
    relu, sugar = (line.get_ydata().tolist() for line in figure.axes[0].lines)
    assert (str(relu[0]), relu[1], sugar) == ("nan", 1.0, [0.5, 1.0])
    plots.save(figure, tmp_path / "norms")


def test_metrics_by_epoch():
    lines = [dict(epoch=i, train_loss=1 / i, val_loss=2 / i, val_top1=i / 10, lr=None) for i in range(1, 5)]
    shown = [find_metric(key) for key in ("val_loss", "val_top1")]
    figure = plots.metric_curves({"whole": lines, "begun": lines[:1]}, shown)
    loss, accuracy = figure.axes
    assert [line.get_ydata().tolist() for line in loss.lines] == [[2.0, 1.0, 2 / 3, 0.5], [2.0]]
    assert accuracy.lines[0].get_ydata().tolist() == pytest.approx([10, 20, 30, 40])
    assert accuracy.get_title() == "validation top-1 accuracy (%)"
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in loss.lines}) == 2
    for ax in figure.axes:
        assert all(tick == int(tick) for tick in ax.get_xticks())
    panels = plots.metric_curves({"whole": lines}).axes
    assert [len(ax.lines) for ax in panels if ax.get_visible()] == [1, 1, 1, 0, 0, 0]  # no lr, dead units or sparsity
