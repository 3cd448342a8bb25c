"""The paper's figures: what is drawn, by the data of the lines and bars, and that they are written."""

import pytest
from matplotlib.patches import Rectangle

from paper.figures import accuracy_bars, seed_curves
from timm_sugar.analysis.plots import save


def _runs(*losses):
    return [[{"epoch": i + 1, "val_loss": loss, "val_top1": loss / 10} for i, loss in enumerate(run)] for run in losses]


def test_curves_are_means_with_a_band_of_one_standard_deviation(tmp_path):
    runs = {"ReLU": _runs((1.0, 3.0, 9.0), (3.0, 5.0)), "SUGAR": _runs((1.0, 2.0))}
    figure = seed_curves(runs, ("val_loss", "val_top1"), log_scale=True)
    loss, accuracy = figure.axes
    assert [line.get_ydata().tolist() for line in loss.lines] == [[2.0, 4.0], [1.0, 2.0]]  # 2 epochs are in both
    band = loss.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((2 - 2**0.5, 4 + 2**0.5))
    assert [line.get_ydata().tolist() for line in accuracy.lines] == [[20.0, 40.0], [10.0, 20.0]]
    assert (loss.get_yscale(), accuracy.get_yscale()) == ("log", "linear")
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in loss.lines}) == 2
    save(figure, tmp_path / "curves")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")


def test_bars_stand_on_the_baseline(tmp_path):
    rows = [("relu", "70", "1"), ("elu", 75, 0.5), ("sugar_elu", 80, None), ("sugar_nelu_0.01", 69, 2.0)]
    rows = [dict(zip(("activation", "top1_percent", "std_percent"), row, strict=True)) for row in rows]
    figure = accuracy_bars(rows, "ResNet-18")
    (ax,) = figure.axes
    rectangles = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    bars = [patch for patch in rectangles if patch.get_width() == pytest.approx(0.4)]
    assert sorted((bar.get_y(), bar.get_height()) for bar in bars) == [(70.0, -1.0), (70.0, 5.0), (70.0, 10.0)]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["NeLU\n0.01", "ELU"]
    # The ends of the error bars: of ELU's 75 and of NeLU's 69, none of the bar without a deviation.
    caps = {float(y) for line in ax.lines if line.get_marker() == "_" for y in line.get_ydata() if y == y}
    assert caps == {74.5, 75.5, 67.0, 71.0}
    save(figure, tmp_path / "bars")
    with pytest.raises(ValueError, match="no row has the activation relu"):
        accuracy_bars(rows[1:])
