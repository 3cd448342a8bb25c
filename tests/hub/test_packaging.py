"""Packaged folders: what config.json says for each kind of network, the weights, and the card."""

import json

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

import timm_sugar
from timm_sugar.hub import surrogate_of, write_model_folder
from timm_sugar.models import build

DATA_CONFIG = dict(
    input_size=(3, 32, 32), interpolation="bicubic", crop_pct=1.0, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
)
FACTS = dict(
    data="cifar10", test_top1=0.71234, val_top1=0.7, dead_units=0.01, activation_sparsity=0.55, parameters=12345678,
    train_images=45000, epochs=2, best_epoch=2, seed=42, settings=dict(epochs=2),
)  # fmt: skip
TINY_HEAD = {"mlp_ratio": 1 / 64}


def _package(folder, name, **arguments):
    model = build(name, num_classes=3, **arguments)
    write_model_folder(folder, model, name, ("ant", "bee", "cat"), DATA_CONFIG, FACTS)
    return model, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "arguments", "architecture", "model_args"),
    [
        ("resnet18_sugar_bsilu", {}, "resnet18", {}),
        ("resnet18_sugar_bsilu", {"surrogate": "nelu", "alpha": 0.1}, "resnet18", {}),
        ("resnet18_sugar_bsilu", {"act_layer": "gelu"}, "resnet18", {"act_layer": "gelu"}),
        ("resnet18_sugar_bsilu", {"act_layer": "relu"}, "resnet18", {"act_layer": "relu"}),
        (
            "resnet18_sugar_bsilu",  # timm alone has no such activation
            {"act_layer": "nelu", "alpha": 0.5},
            "resnet18_sugar_bsilu",
            {"act_layer": "nelu", "alpha": 0.5},
        ),
        ("vgg16_sugar_bsilu", {"act_layer": "relu"} | TINY_HEAD, "vgg16", TINY_HEAD),  # timm's takes no name
        (
            "vgg16_sugar_bsilu",
            {"act_layer": "gelu"} | TINY_HEAD,
            "vgg16_sugar_bsilu",
            {"act_layer": "gelu"} | TINY_HEAD,
        ),
        ("resnet18_cifar_sugar_bsilu", {}, "resnet18_cifar_sugar_bsilu", {}),
        ("resnet18_cifar_sugar_bsilu", {"surrogate": "elu"}, "resnet18_cifar_sugar_bsilu", {"surrogate": "elu"}),
        ("resnet18", {"act_layer": "sugar_mish"}, "resnet18", {"act_layer": "relu"}),
        ("convnext_atto", {"surrogate": "nelu"}, "convnext_atto", {"act_layer": "relu"}),
    ],
)
def test_config(tmp_path, name, arguments, architecture, model_args):
    model, config = _package(tmp_path / "model", name, **arguments)
    assert config["architecture"] == architecture
    kept = {k: v for k, v in config["model_args"].items() if k not in ("global_pool", "in_chans")}
    assert kept == model_args
    assert config["dtype"] == "float32"
    assert config["label_names"] == ["ant", "bee", "cat"]
    assert config["num_classes"] == 3
    surrogate, alpha = surrogate_of(model)
    named = {"act_layer": "relu"} if (architecture, surrogate) == ("vgg16", None) else {}
    assert config["timm_sugar"] == {"architecture": name, "surrogate": surrogate, "alpha": alpha} | named

    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for load in (timm.create_model, timm_sugar.create_model):
        loaded = load(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(loaded(x), model.eval()(x))
        assert loaded.pretrained_cfg["mean"] == [0.5, 0.4, 0.3]
    assert surrogate_of(loaded) == (surrogate, alpha)
    transform = timm.data.resolve_model_data_config(loaded)
    assert (transform["input_size"], transform["crop_pct"]) == ((3, 32, 32), 1.0)


def test_weights_are_safetensors_that_transformers_accepts(tmp_path):
    model, _ = _package(tmp_path / "model", "resnet18_sugar_bsilu")
    with safe_open(tmp_path / "model/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(model.state_dict())


def test_card_has_metadata_and_the_measured_numbers(tmp_path):
    _package(tmp_path / "model", "resnet18_sugar_bsilu")
    card = ModelCard.load(tmp_path / "model/README.md")
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "timm", "image-classification")
    assert data.datasets == ["uoft-cs/cifar10"]
    (result,) = data.eval_results
    assert (result.metric_value, result.dataset_type) == (0.7123, "uoft-cs/cifar10")
    for shown in ("71.23%", "70.00%", "12,345,678", "45,000", "ant, bee, cat", "bsilu with alpha 1.67", "epochs: 2"):
        assert shown in card.text
    assert "{{" not in card.text
    assert "{%" not in card.text


def test_a_baselines_card_does_not_claim_sugar(tmp_path):
    _package(tmp_path / "model", "resnet18_sugar_bsilu", act_layer="relu")
    text = ModelCard.load(tmp_path / "model/README.md").text
    assert "trained without a surrogate gradient" in text
    assert "timm_sugar.create_model" not in text


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/left-over.bin").write_text("x")
    _package(tmp_path / "model", "resnet18_sugar_bsilu")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    assert not (tmp_path / "model/left-over.bin").exists()


def test_wrong_number_of_class_names(tmp_path):
    model = timm.create_model("resnet18_sugar_bsilu", num_classes=4)
    with pytest.raises(ValueError, match="2 class names for a model of 4 classes"):
        write_model_folder(tmp_path / "model", model, "resnet18_sugar_bsilu", ("a", "b"), DATA_CONFIG, FACTS)
    assert not (tmp_path / "model").exists()


def test_mixed_surrogates_are_refused():
    model = torch.nn.Sequential(timm_sugar.Sugar("bsilu"), timm_sugar.Sugar("nelu"))
    with pytest.raises(ValueError, match="mixes surrogates"):
        surrogate_of(model)
