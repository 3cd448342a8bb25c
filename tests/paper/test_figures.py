"""The paper's figures: what is drawn, by the data of the lines and bars, and that they are written."""

import pytest
from matplotlib.patches import Rectangle

from paper.figures import accuracy_bars, method_style, surrogate_style
from timm_sugar.analysis.palette import assign_styles
from timm_sugar.analysis.plots import save


def test_an_activation_has_one_colour_in_all_pictures():
    for name in ("bsilu", "nelu", "gelu"):
        assert method_style(f"sugar_{name}")[1] == method_style(f"rai_sugar_{name}")[1] == surrogate_style(name)[1]
        assert surrogate_style(name)[1] == assign_styles(["relu", f"sugar_{name}"])[1].colour
    assert method_style("he")[1] == method_style("rai")[1] == assign_styles(["relu"])[0].colour
    assert method_style("rai_sugar_bsilu")[0] == "SUGAR B-SiLU, RAI"


def test_bars_stand_on_the_baseline(tmp_path):
    rows = [("relu", "70", "1"), ("elu", 75, 0.5), ("sugar_elu", 80, None), ("sugar_nelu_0.01", 69, 2.0)]
    rows = [dict(zip(("activation", "top1_percent", "interval_percent"), row, strict=True)) for row in rows]
    figure = accuracy_bars(rows, "ResNet-18")
    (ax,) = figure.axes
    rectangles = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    bars = [patch for patch in rectangles if patch.get_width() == pytest.approx(0.4)]
    elu = {bar.get_height(): bar for bar in bars}
    assert elu[5.0].get_edgecolor() == elu[10.0].get_facecolor() != elu[-1.0].get_facecolor()  # a colour a function
    assert sorted(text.get_text() for text in ax.texts) == [" no run", "+10.0", "+5.0", "-1.0"]
    assert sorted((bar.get_y(), bar.get_height()) for bar in bars) == [(70.0, -1.0), (70.0, 5.0), (70.0, 10.0)]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["NeLU\n0.01", "ELU"]
    # The ends of the error bars: of ELU's 75 and of NeLU's 69, none of the bar without a deviation.
    caps = {float(y) for line in ax.lines if line.get_marker() == "_" for y in line.get_ydata() if y == y}
    assert caps == {74.5, 75.5, 67.0, 71.0}
    save(figure, tmp_path / "bars")
    with pytest.raises(ValueError, match="no row has the activation relu"):
        accuracy_bars(rows[1:])
