"""Packaged folders: what config.json says for each kind of network, the weights, and the card."""

import copy
import json
import sys
import types

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from timm.models import _registry

import timm_sugar
from timm_sugar import surrogates
from timm_sugar.hub import packaging, write_model_folder
from timm_sugar.hub.packaging import _write_config
from timm_sugar.hub.reload import loads_in
from timm_sugar.layers import Activation
from timm_sugar.models import _pretrained, build
from timm_sugar.models.swin_transformer import SugarSwinTransformer

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
    activation = Activation.of(model)
    surrogate, alpha = activation.surrogate, activation.alpha
    named = {"act_layer": "relu"} if (architecture, surrogate) == ("vgg16", None) else {}
    assert config["timm_sugar"] == {"architecture": name, "surrogate": surrogate, "alpha": alpha} | named

    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for load in (timm.create_model, timm_sugar.create_model):
        loaded = load(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(loaded(x), model.eval()(x))
        assert loaded.pretrained_cfg["mean"] == [0.5, 0.4, 0.3]
    assert Activation.of(loaded) == Activation(surrogate, alpha)
    transform = timm.data.resolve_model_data_config(loaded)
    assert (transform["input_size"], transform["crop_pct"]) == ((3, 32, 32), 1.0)


NEW_FAMILY = """
from timm.models import generate_default_cfgs
from timm.models.{module} import {cls}
from timm_sugar.layers import Activation
from timm_sugar.models._pretrained import IMAGENET_INPUT, build_variant, cfg, register_variant
default_cfgs = generate_default_cfgs({{"{name}": cfg(**IMAGENET_INPUT, first_conv="stem.0", classifier="head.fc")}})
@register_variant(Activation("nelu"), stock="{stock}")
def {name}(pretrained=False, **kwargs):
    return build_variant({cls}, "{name}", pretrained, **dict({arguments}, **kwargs))
"""


@pytest.fixture
def new_family(monkeypatch):
    """Register an entrypoint as CONTRIBUTING says, in a module of this package, and take it back afterwards."""
    for table in ("_model_entrypoints", "_model_to_module", "_model_pretrained_cfgs", "_model_default_cfgs"):
        monkeypatch.setattr(_registry, table, dict(getattr(_registry, table)))
    for table in ("_module_to_models", "_model_with_tags"):
        monkeypatch.setattr(_registry, table, copy.deepcopy(getattr(_registry, table)))

    monkeypatch.setattr(_pretrained, "_VARIANTS", dict(_pretrained._VARIANTS))

    def register(name, **code):
        module = types.ModuleType(f"timm_sugar.models.{code['module']}_of_a_test")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        stock = name.removesuffix("_sugar_nelu")
        exec(NEW_FAMILY.format(name=name, stock=stock, **code), vars(module))

    return register


def test_a_new_family_that_timm_builds_with_relu_is_named_as_stock(new_family, tmp_path):
    arguments = "dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320), conv_mlp=True)"
    new_family("convnext_atto_sugar_nelu", module="convnext", cls="ConvNeXt", arguments=arguments)
    _, config = _package(tmp_path / "model", "convnext_atto_sugar_nelu")  # loads it back with stock timm
    assert config["architecture"] == "convnext_atto"
    assert config["model_args"]["act_layer"] == "relu"


def test_a_new_family_that_timm_cannot_build_names_itself(new_family, tmp_path):
    name = "swin_tiny_patch4_window7_224_sugar_nelu"
    arguments = "dict(depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))"
    new_family(name, module="swin_transformer", cls="SwinTransformer", arguments=arguments)
    sys.modules["timm_sugar.models.swin_transformer_of_a_test"].SwinTransformer = SugarSwinTransformer
    model = timm.create_model(name, num_classes=3)
    data_config = DATA_CONFIG | {"input_size": (3, 224, 224)}
    config = _write_config(tmp_path / "config.json", model, name, ("ant", "bee", "cat"), data_config)
    assert (config["architecture"], loads_in(config)) == (name, "plugin")


def test_an_architecture_of_timm_without_relu_is_for_this_package_alone(tmp_path):
    name = "swin_tiny_patch4_window7_224"
    small = dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), img_size=64)
    model = build(name, surrogate="nelu", alpha=0.3, num_classes=3, **small)
    data_config = DATA_CONFIG | {"input_size": (3, 64, 64)}
    write_model_folder(tmp_path / "model", model, name, ("ant", "bee", "cat"), data_config, FACTS)
    card = (tmp_path / "model/README.md").read_text()
    assert 'timm_sugar.create_model("local-dir:FOLDER", pretrained=True).eval()' in card
    assert "transformers" not in card
    with pytest.raises(TypeError, match="surrogate"):  # stock timm would load it under GELU
        timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    loaded = timm_sugar.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert Activation.of(loaded) == Activation("nelu", 0.3)


@pytest.mark.parametrize("name", ["resnet18_sugar_bsilu", "resnet18_cifar_sugar_bsilu"])
def test_a_surrogate_of_the_users_own(tmp_path, monkeypatch, name):
    monkeypatch.setattr(surrogates, "_SURROGATES", dict(surrogates._SURROGATES))
    timm_sugar.register_surrogate("mine", lambda x, alpha: torch.sigmoid(alpha * x), alpha=2.0)
    _, config = _package(tmp_path / "model", name, surrogate="mine", alpha=3.0)  # loads where nobody knows it
    assert config["timm_sugar"] == {"architecture": name, "surrogate": "mine", "alpha": 3.0}
    assert Activation.of(timm_sugar.create_model(f"local-dir:{tmp_path}/model")) == Activation("mine", 3.0)


def test_a_package_that_stock_timm_loads_as_another_network_is_not_written(tmp_path, monkeypatch):
    _package(tmp_path / "model", "resnet18_sugar_bsilu")
    before = (tmp_path / "model/config.json").read_bytes()
    monkeypatch.setattr(packaging, "stock_arguments", lambda model, architecture: {})
    with pytest.raises(ValueError, match=r"timm without timm_sugar loads .* as another network: logits differ by"):
        _package(tmp_path / "model", "convnext_atto", surrogate="nelu", ls_init_value=1.0)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    assert (tmp_path / "model/config.json").read_bytes() == before


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
        Activation.of(model)
