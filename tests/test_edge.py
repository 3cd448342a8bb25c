"""The script of the edge page at its smallest: what it draws, exports and measures; the page has its numbers."""

import json
import re
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import edge
from timm_sugar import Sugar

DOCS = Path(__file__).parents[1] / "docs"
SMALLEST = ["--seeds", "0", "--steps", "3", "--more-steps", "2", "--images", "16", "--test", "16", "--size", "32"]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def studied(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("edge")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edge, "ACTIVATIONS", ("silu", "sugar_bsilu"))
        edge.main([*SMALLEST, "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def cells(studied) -> dict[str, dict]:
    return {cell["name"]: cell for cell in json.loads((studied / "edge.json").read_text())["cells"]}


def test_onnx_says_what_torch_says_and_holds_no_sugar(cells, studied):
    assert list(cells) == ["random-silu-0", "random-sugar_bsilu-0", "silu-silu-0", "silu-sugar_bsilu-0"]
    for cell in cells.values():
        assert cell["float_difference"] < 1e-4
        assert cell["float_iou"] == pytest.approx(cell["torch_iou"], abs=1e-3)
    silu, sugar = cells["random-silu-0"], cells["random-sugar_bsilu-0"]
    assert (silu["converted"], sugar["converted"]) == (0, 27)  # 26 of the backbone and one of the head
    assert (silu["float_operators"]["Sigmoid"], sugar["float_operators"]["Relu"]) == (27, 27)
    assert "Sigmoid" not in sugar["float_operators"]
    for path in studied.glob("*.onnx"):
        assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx", "com.microsoft"}


def test_int8_runs_and_is_smaller(cells, studied):
    for name, cell in cells.items():
        assert 0 < cell["int8_difference"] < 1
        assert cell["int8_iou"] == pytest.approx(cell["float_iou"], abs=0.05)
        assert 3 < cell["float_bytes"] / cell["int8_bytes"] < 4.2
        weights = {t.name: t.data_type for t in onnx.load(studied / f"{name}.int8.onnx").graph.initializer}
        kernels = [kind for weight, kind in weights.items() if weight.endswith("_quantized") and "weight" in weight]
        assert kernels.count(onnx.TensorProto.INT8) > 30
    assert (
        cells["random-sugar_bsilu-0"]["int8_operators"]["DequantizeLinear"]
        < (cells["random-silu-0"]["int8_operators"]["DequantizeLinear"])
    )


def test_what_is_finished_is_not_run_again_and_other_settings_are_refused(studied, capsys, monkeypatch):
    monkeypatch.setattr(edge, "ACTIVATIONS", ("silu", "sugar_bsilu"))
    monkeypatch.setattr(edge, "fit", None)
    edge.main([*SMALLEST, "--output", str(studied)])
    assert "27 SiLUs" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        edge.main([*SMALLEST, "--output", str(studied), "--lr", "0.1"])
    assert stopped.value.code == 2
    assert "was measured with other settings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        edge.main(["--size", "50", "--output", str(studied)])
    assert "--size must be a multiple of 16" in capsys.readouterr().err


def test_each_activation_takes_the_place_of_every_silu():
    for activation, kind in (("relu", nn.ReLU), ("sugar_nelu", Sugar), ("silu", nn.SiLU)):
        network, reached = edge.with_activation(edge.Segmenter("cs3darknet_focus_s"), activation)
        kinds = [type(m) for m in network.modules() if isinstance(m, (nn.ReLU, Sugar, nn.SiLU))]
        assert (kinds, reached) == ([kind] * 27, 27 if activation != "silu" else 0)


def test_shapes_and_iou():
    images, masks = edge.draw_shapes(40, 48, seed=3)
    assert (images.shape, images.dtype, masks.shape) == ((40, 3, 48, 48), torch.float32, (40, 48, 48))
    assert torch.equal(images, edge.draw_shapes(40, 48, seed=3)[0])
    assert not torch.equal(images, edge.draw_shapes(40, 48, seed=4)[0])
    shares = torch.bincount(masks.flatten(), minlength=4) / masks.numel()
    assert len(shares) == 4
    assert shares[1:].min() > 0.02
    assert edge.mean_iou(masks, masks) == 1
    true, found = torch.tensor([0, 1, 2, 3, 3, 3]), torch.tensor([0, 1, 2, 3, 3, 0])
    assert edge.mean_iou(found, true) == pytest.approx((1 / 2 + 1 + 1 + 2 / 3) / 4)


def test_the_page_has_the_tables_of_the_committed_run():
    page = (DOCS / "edge.md").read_text(encoding="utf-8")
    stored = json.loads((DOCS / "edge/edge.json").read_text())
    assert edge.tables(stored["cells"]) in page
    assert f"torch {stored['versions']['torch']}" in page
    assert {cell["converted"] for cell in stored["cells"] if cell["activation"] != "silu"} == {27}
    assert max(cell["float_difference"] for cell in stored["cells"]) < 1e-3
    assert not re.search(r"TODO|XXX", page)
