"""The cost of activations in whole networks: what is compared, what is counted, what is refused."""

import pytest
import timm
import torch
from torch import nn

from timm_sugar.analysis.speed import activations, bench, saved_bytes, time_shuffled

SMALL = dict(channels=[8, 8, 8, 8], img_size=16, batch_size=4, rounds=1)


def test_every_activation_is_compared_with_relu():
    rows = bench("resnet18_sugar_bsilu", **SMALL)
    assert [row["activation"] for row in rows] == [*activations("bsilu")]
    assert rows[0]["vs_relu"] == rows[0]["saved_vs_relu"] == 1.0
    saved = {row["activation"]: row["eager_saved_mib"] for row in rows}
    assert saved["relu"] < saved["sugar_uint4"] < saved["sugar_uint8"] < saved["gelu"] < saved["fgi_direct"]
    assert all(row["ms"] > 0 and row["images_per_second"] == pytest.approx(4000 / row["ms"]) for row in rows)


def test_a_fixed_image_size_is_passed_on():
    kwargs = dict(embed_dim=8, depths=(1, 1), num_heads=(1, 1), window_size=2)
    (row,) = bench("swin_tiny_sugar_nelu", img_size=16, batch_size=2, rounds=1, only=["relu"], **kwargs)
    assert row["activation"] == "relu"


def test_saved_bytes_of_a_known_network():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    images = torch.randn(16, 4)
    assert saved_bytes(model, images) == 4 * 16 * (4 + 8 + 8)  # the input, and GELU's input and output
    with torch.no_grad():
        assert saved_bytes(model, images) == 0


def test_median_of_shuffled_rounds_leaves_the_warm_up_out():
    times = {"a": iter([100.0, 100.0, 1.0, 3.0, 2.0]), "b": iter([0.0, 0.0, 5.0, 5.0, 5.0])}
    assert time_shuffled({name: seconds.__next__ for name, seconds in times.items()}, rounds=3) == {"a": 2.0, "b": 5.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(model="resnet18_sugar_bsil"), "unknown model 'resnet18_sugar_bsil'; did you mean 'resnet18_sugar_bsilu'"),
        (dict(model="resnet18", only=["gelux"]), "unknown activation 'gelux'; did you mean 'gelu'"),
        (dict(model="resnet18", surrogate="nelux"), "unknown surrogate 'nelux'; did you mean 'nelu'"),
        (
            dict(model="vit_tiny_patch16_224", img_size=32, extra=1),
            "model vit_tiny_patch16_224 takes no act_layer, or not",
        ),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench(**arguments)


def test_models_of_timm_that_take_a_class():
    assert timm.is_model("convnext_atto")
    rows = bench(
        "convnext_atto", img_size=32, batch_size=1, rounds=1, only=["sugar"], depths=(1, 1, 1, 1), dims=(8,) * 4
    )
    assert [row["activation"] for row in rows] == ["relu", "sugar"]
