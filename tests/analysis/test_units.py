"""Dead units and sparsity against counts made by hand."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import timm_sugar
from timm_sugar.analysis import count_units


def _conv_and_linear(activation):
    model = nn.Sequential(nn.Conv2d(1, 3, 1), activation(), nn.Flatten(), nn.Linear(12, 4), activation())
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1, 1)
        model[0].bias[:] = torch.tensor([0.0, 0.0, -1.0])  # active for x > 0, for x < 0, never
        model[3].weight.zero_()
        model[3].bias[:] = torch.tensor([1.0, 0.0, -1.0, 2.0])
    return model


@pytest.mark.parametrize("activation", [nn.ReLU, timm_sugar.Sugar, nn.GELU, lambda: nn.ReLU(inplace=True)])
def test_counts(activation):
    model = _conv_and_linear(activation)
    x = torch.zeros(5, 1, 2, 2)
    x[:2, 0, 0, 0] = 1.0
    x[2, 0, 1, 1] = -1.0
    with torch.no_grad(), count_units(model) as units:
        model(x[:3])
        model(x[3:])
    assert {name: layer.images for name, layer in units.layers.items()} == {"1": 5, "4": 5}
    assert units.layers["1"].active.tolist() == [[[2, 0], [0, 0]], [[0, 0], [0, 1]], [[0, 0], [0, 0]]]
    assert units.layers["1"].units.tolist() == [2, 1, 0]
    assert units.layers["4"].units.tolist() == [5, 0, 0, 5]
    assert units.dead_units == pytest.approx(3 / 7)
    assert units.dead_elements == pytest.approx((10 + 2) / 16)
    assert units.sparsity == pytest.approx(1 - 13 / 80)


def test_a_module_called_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(self.relu(x)[:, :2] - 1)

    model = Twice()
    with count_units(model) as units:
        model(torch.tensor([[2.0, 0.5, -1.0]]))
        model(torch.tensor([[0.5, 3.0, -1.0]]))
    assert units.layers["relu"].active.tolist() == [2, 2, 0]
    assert units.layers["relu:2"].active.tolist() == [1, 1]


def test_more_images_than_a_byte_counts():
    model = _conv_and_linear(nn.ReLU)
    with torch.no_grad(), count_units(model) as units:
        model(torch.ones(600, 1, 2, 2))
    assert units.layers["1"].active[:, 0, 0].tolist() == [600, 0, 0]
    assert units.layers["1"].images == 600


def test_sequences_of_different_lengths():
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU())
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([[1.0], [-1.0]])
        model[0].bias.zero_()
    with count_units(model) as units:
        for length in (2, 3, 1):
            model(torch.ones(4, length, 1))
    layer = units.layers["1"]
    assert layer.active.tolist() == [[12, 0], [8, 0], [4, 0]]
    assert (layer.units.tolist(), layer.seen) == ([24, 0], 48)
    assert units.sparsity == 0.5


def test_attributes_that_hold_a_function_count():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, activation=F.gelu).eval()
    with torch.inference_mode(), count_units(layer) as units:
        with_counting = layer(torch.ones(3, 5, 8))
    assert [(n, c.kind, c.active.shape) for n, c in units.layers.items()] == [("activation", "gelu", (5, 12))]
    assert layer.activation is F.gelu
    torch.testing.assert_close(layer(torch.ones(3, 5, 8)), with_counting)


def test_gates_do_not_count():
    class SEModule(nn.Sequential):
        pass

    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), SEModule(nn.Conv2d(2, 2, 1), nn.ReLU()), nn.PReLU())
    with count_units(model) as units:
        model(torch.ones(1, 1, 1, 1))
    assert [(n, c.kind) for n, c in units.layers.items()] == [("1", "relu"), ("3", "prelu")]


class _ChannelsBackAgain(nn.Module):
    """Features last in the first half, as in an MLP of Swin; channels first in the second, as in a convolution."""

    def __init__(self):
        super().__init__()
        self.linear, self.act1, self.norm, self.act2 = nn.Linear(3, 5), nn.ReLU(), nn.BatchNorm2d(5), nn.ReLU()

    def forward(self, x):
        return self.act2(self.norm(self.act1(self.linear(x)).permute(0, 3, 1, 2)))


@pytest.mark.parametrize(
    ("build", "image", "expected"),
    [
        (lambda: timm.create_model("test_convnext"), (3, 64, 64), {"stages.0.blocks.0.mlp.act": 96}),
        (lambda: timm.create_model("test_convnext", conv_mlp=True), (3, 64, 64), {"stages.0.blocks.0.mlp.act": 96}),
        (
            lambda: timm.create_model(
                "maxvit_rmlp_pico_rw_256", depths=(1, 1), embed_dim=(32, 64), stem_width=8, img_size=64
            ),
            (3, 64, 64),
            {"stages.0.blocks.0.attn_grid.mlp.act": 128, "stages.1.blocks.0.conv.norm1.act": 128},
        ),
        (
            lambda: torchvision.models.SwinTransformer([2, 2], 16, [1, 1], [2, 2], [4, 4]),
            (3, 16, 16),
            {"features.1.0.mlp.1": 64, "features.3.0.mlp.1": 128},
        ),
        (_ChannelsBackAgain, (7, 6, 3), {"act1": 5, "act2": 5}),
        (lambda: nn.Sequential(nn.LayerNorm(6), nn.GELU()), (4, 6), {"1": 6}),
        (lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU()), (3,), {"2": 5}),
    ],
)
def test_units_are_features_or_channels(build, image, expected):
    model = build().eval()
    with torch.no_grad(), count_units(model) as units:
        model(torch.randn(1, *image))
    assert {name: len(units.layers[name].units) for name in expected} == expected


def test_hooks_are_removed():
    model = _conv_and_linear(nn.ReLU)
    with pytest.raises(RuntimeError, match="stop"), count_units(model):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
