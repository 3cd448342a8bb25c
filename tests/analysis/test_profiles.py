"""Profiles against counts made by hand, on networks of timm, torchvision and transformers, and by the command line."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import timm_sugar
from timm_sugar.analysis import count_units, gradient_norms, profile, revived_units
from timm_sugar.analysis.profiles import BINS
from timm_sugar.cli import main
from timm_sugar.training import TrainConfig, train


def _linear(weights, biases, activation=nn.ReLU):
    model = nn.Sequential(nn.Linear(1, len(biases)), activation())
    with torch.no_grad():
        model[0].weight[:] = torch.tensor(weights).view(-1, 1)
        model[0].bias[:] = torch.tensor(biases)
    return model


@pytest.mark.parametrize("activation", [nn.ReLU, timm_sugar.Sugar, nn.GELU, nn.PReLU])
def test_linear_units_by_hand(activation):
    model = _linear([1.0, 0.0, 0.0, -1.0], [0.0, 1.0, -1.0, 0.0], activation)  # x > 0, always, never, x < 0
    x = torch.tensor([[3.0], [2.0], [1.0], [-1.0], [0.0]])
    model.train()
    found = profile(model, [x[:2], (x[2:], torch.zeros(3))])
    assert model.training
    (layer,) = found.layers
    assert (layer.name, layer.units, layer.elements, layer.dead, layer.always_active) == ("1", 4, 4, 1, 1)
    assert layer.probability == [0.6, 1.0, 0.0, 0.2]
    assert layer.sparsity == pytest.approx(1 - 9 / 20)
    assert {i: n for i, n in enumerate(layer.histogram) if n} == {0: 1, 10: 1, 30: 1, 49: 1}
    assert (found.images, found.dead_units, found.always_active, found.sparsity) == (5, 0.25, 0.25, layer.sparsity)
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["kind"] == layer.kind


def test_a_channel_is_a_unit_and_a_position_of_it_an_element():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    x = torch.ones(4, 1, 1, 2)
    x[0, 0, 0, 1] = -1.0
    (layer,) = profile(model, [x]).layers
    assert (layer.units, layer.elements, layer.dead, layer.always_active, layer.dead_elements) == (2, 4, 0, 0, 1)
    assert layer.probability == [0.875, 0.125]
    assert {i: n for i, n in enumerate(layer.histogram) if n} == {0: 1, BINS // 4: 1, BINS * 3 // 4: 1, BINS - 1: 1}


def test_networks_of_other_libraries():
    transformers = pytest.importorskip("transformers")
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    config = transformers.ViTConfig(image_size=16, patch_size=8, hidden_act="relu", **size)
    images = torch.randn(3, 3, 16, 16)
    found = profile(
        transformers.ViTForImageClassification(config), [{"pixel_values": images, "labels": torch.tensor([0, 1, 0])}]
    )
    assert [(layer.kind, layer.units, layer.elements) for layer in found.layers] == [("relu", 24, 5 * 24)] * 2
    found = profile(timm.create_model("test_convnext"), [F.interpolate(images, 32)])
    assert {(layer.kind, layer.units) for layer in found.layers} == {("gelu", n) for n in (96, 128, 192, 256)}
    found = profile(torchvision.models.VisionTransformer(16, 8, 1, 2, 16, 24), [images])
    assert [(layer.kind, layer.units) for layer in found.layers] == [("gelu", 24)]


class _CallsByName(nn.Module):
    def __init__(self, *activations):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 2), *activations)

    def forward(self, x):
        return F.relu(self.layers(x))


def test_what_cannot_be_counted_is_said():
    with pytest.warns(UserWarning, match="leaves out relu in the forward of _CallsByName"):
        found = profile(_CallsByName(nn.GELU()), [torch.ones(2, 1)])
    assert found.unseen == {"": ["relu"]}
    with pytest.raises(ValueError, match="no activation module or attribute to profile; out of reach are relu in"):
        profile(_CallsByName(), [torch.ones(2, 1)])
    with pytest.raises(ValueError, match="no images"):
        profile(_linear([1.0], [0.0]), [])


def test_memory_does_not_grow_with_the_images():
    model = _linear([1.0, 0.0], [0.0, 1.0])
    sizes = []
    with torch.inference_mode(), count_units(model) as counts:
        for _ in range(3):
            model(torch.randn(1000, 1))
            sizes.append(sum(layer.active.nbytes for layer in counts.layers.values()))
    assert sizes == [16, 16, 16]


def test_gradients_reach_the_weights_of_a_dead_unit_with_sugar_only():
    model = nn.Sequential(*_linear([1.0, 1.0], [-9.0, -9.0]), nn.Linear(2, 2))
    x, labels = torch.randn(4, 1), torch.tensor([0, 1, 0, 1])
    first, last = gradient_norms(model, x, labels)
    assert (first["name"], last["name"]) == ("0", "2")
    assert first["relu"] == 0 < first["sugar"]
    assert last["relu"] == last["sugar"]  # of the loss alone: both have the same outputs

    twin = timm_sugar.convert(nn.Sequential(*model), "bsilu")
    assert gradient_norms(twin, x, labels) == [first, last]
    loss = F.cross_entropy(twin(x), labels)
    loss.backward()
    assert first["sugar"] == pytest.approx(twin[0].weight.grad.norm().item())
    with pytest.raises(ValueError, match="with GELU there is no ReLU twin"):
        gradient_norms(nn.Sequential(nn.Linear(1, 2), nn.GELU()), x, labels)


def test_revived_and_died():
    def profiled(*biases):
        return profile(_linear([0.0] * len(biases), biases), [torch.ones(2, 1)]).to_dict()

    before, after = profiled(1.0, -1.0, -1.0, 1.0), profiled(-1.0, 1.0, -1.0, 1.0)
    expected = {"name": "1", "units": 4, "dead_before": 2, "dead_after": 2, "revived": 1, "died": 1}
    assert revived_units(before, after) == [expected]
    with pytest.raises(ValueError, match="layers differ"):
        revived_units(before, profiled(1.0))


@pytest.fixture(scope="module")
def run(tmp_path_factory, parquet_folder):
    """A small finished run in which many units are dead."""
    output = tmp_path_factory.mktemp("runs") / "dying"
    network = {"cfg": [4, "M", 4, "M", 4, "M", 4, "M", 8, "M"], "norm_layer": ""}
    settings = dict(model="vgg16_cifar_sugar_bsilu", model_args=network, epochs=1, opt="adamw", lr=0.1, limit_val=20)
    train(TrainConfig(data=parquet_folder, batch_size=16, limit_train=64, seed=1, output=str(output), **settings))
    return output


def test_profile_of_a_run(run, parquet_folder, capsys):
    assert main(["profile", str(run), "--data", parquet_folder, "--json"]) == 0
    out, err = capsys.readouterr()
    found, summary = json.loads(out), json.loads((run / "summary.json").read_text())
    assert err == ""
    assert (found["split"], found["images"], found["surrogate"]) == ("val", 20, "bsilu")
    assert found["dead_units"] == summary["dead_units"] > 0
    assert found["dead_elements"] == summary["dead_elements"]
    assert found["sparsity"] == pytest.approx(summary["activation_sparsity"])
    assert [row["name"] for row in found["gradients"]][-1] == "head.fc"
    assert json.loads((run / "profile.json").read_text()) == found
    for name in ("activation_profile", "dead_units", "gradient_norms"):
        assert (run / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (run / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_profile_as_a_table(run, parquet_folder, capsys, tmp_path):
    assert main(["profile", str(run / "model"), "--data", parquet_folder]) == 0
    out, _ = capsys.readouterr()
    head, *lines = out.splitlines()
    assert head.split() == ["layer", "activation", "units", "dead", "always", "active", "active", "(%)"]
    assert len(lines) == 5 + 2
    assert "dead on 20 images of val" in lines[-1]  # as the card's settings say
    assert not (run / "model" / "profile.json").exists()
    assert main(["profile", str(run / "model"), "--data", parquet_folder, "--output", str(tmp_path / "new")]) == 0
    assert json.loads((tmp_path / "new/profile.json").read_text())["split"] == "val"


def test_a_model_by_name_or_one_line(parquet_folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TIMM_SUGAR_HUB", str(tmp_path))
    model = timm.create_model("resnet18_sugar_bsilu", pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    timm.models.save_for_hf(model, tmp_path / "resnet18_sugar_bsilu.made", safe_serialization=True)
    assert main(["profile", "resnet18_sugar_bsilu", "--data", parquet_folder, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (len(found["layers"]), found["gradients"]) == (17, None)  # the data has other classes
    for name, message in (("vgg16_sugar_bsilu", "No pretrained weights"), ("nothing", "there is no folder nothing")):
        assert main(["profile", name, "--data", parquet_folder]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
