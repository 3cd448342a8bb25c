"""Loading stock weights, and building stock architectures with SUGAR."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import PretrainedCfg, _registry
from torch import nn

import timm_sugar
from timm_sugar import Sugar
from timm_sugar.models import build, is_own, size_arguments
from timm_sugar.models._weights import find_weights

CASES = {
    "resnet18_sugar_bsilu": ("resnet18", {}),
    "vgg16_bn_sugar_bsilu": ("vgg16_bn", dict(mlp_ratio=1 / 64)),
    "swin_tiny_sugar_nelu": (
        "swin_tiny_patch4_window7_224",
        dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_classes", [1000, 7])
def test_stock_weights_load_with_any_classifier(name, num_classes):
    stock, kwargs = CASES[name]
    weights = timm.create_model(stock, **kwargs).state_dict()
    overlay = dict(state_dict={k: v.clone() for k, v in weights.items()})
    model = timm.create_model(name, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay, **kwargs)
    classifier = model.default_cfg["classifier"]
    for key, value in model.state_dict().items():
        if key.rpartition(".")[0] != classifier:
            torch.testing.assert_close(value, weights[key], rtol=0, atol=0)
    assert torch.equal(model.get_classifier().weight, weights[f"{classifier}.weight"]) == (num_classes == 1000)
    assert model.get_classifier().out_features == num_classes
    assert any(isinstance(m, Sugar) for m in model.modules())


@pytest.mark.parametrize("name", ["resnet18_sugar_bsilu", "resnet18_sugar_bsilu.cifar10"])
def test_the_classifier_of_a_file_is_loaded_where_it_fits(name, tmp_path):
    torch.manual_seed(0)
    trained = timm.create_model("resnet18_sugar_bsilu", num_classes=10).eval()
    save_file(trained.state_dict(), tmp_path / "trained.safetensors")
    overlay = dict(file=str(tmp_path / "trained.safetensors"))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        loaded = timm.create_model(name, pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay)
        assert torch.equal(loaded.eval()(x), trained(x))
        named = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay | dict(num_classes=10))
        assert torch.equal(named.eval()(x), trained(x))
    other = timm.create_model(name, pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay)
    assert torch.equal(other.conv1.weight, trained.conv1.weight)
    features = timm.create_model(name, pretrained=True, features_only=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(features.conv1.weight, trained.conv1.weight)


def test_a_classifier_that_nobody_asked_to_replace_is_not_replaced():
    overlay = dict(state_dict=timm.create_model("resnet18", num_classes=10).state_dict())
    with pytest.raises(RuntimeError, match="weights have 10 classes, and the network 1000; num_classes=10 keeps"):
        timm.create_model("resnet18_sugar_bsilu", pretrained=True, pretrained_cfg_overlay=overlay)


def test_stock_weights_load_from_a_file_with_other_input_channels(tmp_path):
    weights = timm.create_model("resnet18").state_dict()
    save_file(weights, tmp_path / "stock.safetensors")
    overlay = dict(file=str(tmp_path / "stock.safetensors"))
    model = timm.create_model("resnet18_sugar_bsilu", pretrained=True, in_chans=1, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(model.conv1.weight, weights["conv1.weight"].sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        (
            "resnet34_sugar_bsilu",
            "resnet18",
            r"not those of resnet34_sugar_bsilu; tensors \d+ missing \(such as 'layer1.2",
        ),
        ("resnet18_sugar_bsilu", "resnet34", r"tensors \d+ unexpected \(such as 'layer1.2"),
        ("resnet18_cifar_sugar_bsilu", "resnet18", r"tensors 1 of another shape \(such as 'conv1.weight'\)"),
        ("conv2next_sugar", "resnet18", "not those of conv2next_sugar"),
    ],
)
def test_weights_of_another_architecture(name, other, message):
    overlay = dict(state_dict=timm.create_model(other).state_dict())
    with pytest.raises(RuntimeError, match=message) as e:
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    assert "\n" not in str(e.value)


UNPUBLISHED = [name for name in timm.list_models() if is_own(name) and not timm.list_pretrained(f"{name}.*")]


@pytest.mark.parametrize("name", UNPUBLISHED)
@pytest.mark.parametrize("direct", [False, True])
def test_pretrained_without_published_weights(name, direct, monkeypatch):
    monkeypatch.delenv("TIMM_SUGAR_HUB", raising=False)
    create = timm.models.model_entrypoint(name) if direct else lambda **kwargs: timm.create_model(name, **kwargs)
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name} in .*hub_cards or in") as e:
        create(pretrained=True)
    assert "\n" not in str(e.value)
    assert "--model" in str(e.value)


def test_a_default_cfg_with_weights_is_found_and_is_the_default(monkeypatch):
    monkeypatch.delenv("TIMM_SUGAR_HUB", raising=False)
    hub_id = "timm-sugar/vgg16_sugar_bsilu"
    cfgs = {f"vgg16_sugar_bsilu.{t}": dict(hf_hub_id=f"{hub_id}.{t}", tag=t) for t in ("one", "two")}
    registered = {name: PretrainedCfg(**cfg) for name, cfg in cfgs.items()}
    for name, cfg in registered.items():
        monkeypatch.setitem(_registry._model_pretrained_cfgs, name, cfg)
    monkeypatch.setitem(_registry._model_pretrained_cfgs, "vgg16_sugar_bsilu", registered["vgg16_sugar_bsilu.one"])
    monkeypatch.setitem(_registry._model_with_tags, "vgg16_sugar_bsilu", [*registered])
    assert find_weights("vgg16_sugar_bsilu", None) == f"hf-hub:{hub_id}.one"
    assert find_weights("vgg16_sugar_bsilu", "two") == f"hf-hub:{hub_id}.two"
    with pytest.raises(RuntimeError, match=r"it has vgg16_sugar_bsilu\.one, vgg16_sugar_bsilu\.two"):
        find_weights("vgg16_sugar_bsilu", "three")


def test_size_arguments():
    for name, size, arguments in (
        ("swin_tiny_sugar_nelu", 64, {"img_size": 64}),
        ("swin_tiny_sugar_nelu", 224, {}),
        ("swin_tiny_sugar_nelu.tin_64", 64, {}),
    ):
        assert size_arguments(name, size) == arguments
        assert timm.create_model(name, device="meta", **arguments).patch_embed.img_size == (size, size)
    assert size_arguments("vit_tiny_patch16_224", 64) == {"img_size": 64}
    assert size_arguments("resnet18_sugar_bsilu", 32) == {}


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "vgg11", "swin_tiny_patch4_window7_224"])
def test_build_puts_sugar_into_stock_architectures(name):
    model = build(name, surrogate="nelu", alpha=0.2, num_classes=3, device="meta")
    assert {(m.surrogate, m.alpha) for m in model.modules() if isinstance(m, Sugar)} == {("nelu", 0.2)}
    assert not any(isinstance(m, (nn.ReLU, nn.GELU)) for m in model.modules())


def test_build_without_surrogate_is_the_stock_model():
    assert not any(isinstance(m, Sugar) for m in build("resnet18", device="meta").modules())
    assert any(isinstance(m, nn.SiLU) for m in build("resnet18", act_layer="silu", device="meta").modules())


def test_build_refuses_contradictions():
    with pytest.raises(ValueError, match="surrogate and act_layer contradict"):
        build("resnet18", surrogate="bsilu", act_layer="relu")
    with pytest.raises(ValueError, match="alpha needs a surrogate"):
        build("resnet18", alpha=1.0)
    with pytest.raises(ValueError, match="did you mean 'nelu'"):
        build("resnet18", surrogate="neul")


def test_create_model_restores_the_surrogate_that_a_folder_records(tmp_path):
    trained = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3, act_layer="relu")
    timm.models.save_for_hf(trained, tmp_path, safe_serialization=True)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    record = dict(architecture="vit_tiny_patch16_224", surrogate="nelu", alpha=0.3)
    path.write_text(json.dumps({**config, "timm_sugar": record}))
    model = timm_sugar.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert {(m.surrogate, m.alpha) for m in model.modules() if isinstance(m, Sugar)} == {("nelu", 0.3)}
    other = timm_sugar.create_model(f"local-dir:{tmp_path}", pretrained=True, surrogate="nelu")
    assert {m.alpha for m in other.modules() if isinstance(m, Sugar)} == {0.01}
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=0, atol=0)
