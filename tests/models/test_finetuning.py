"""Published networks in other people's training: features, layer-wise learning rates, and peft's adapters."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from timm_sugar import Sugar
from timm_sugar.models import is_own

PUBLISHED = [name for name in timm.list_pretrained() if is_own(name)]
ADAPTED = {"resnet": r".*\.conv2", "swin": r".*\.(qkv|fc1)", "conv2next": r".*\.pwconv1"}
HEAD = {"resnet": "fc", "swin": "head.fc", "conv2next": "head"}
published = pytest.mark.parametrize("name", PUBLISHED)


def load(name, **kwargs):
    model = timm.create_model(name, pretrained=True, **kwargs)
    assert any(isinstance(module, Sugar) for module in model.modules())
    return model


def images(name):
    size = timm.get_pretrained_cfg(name).input_size
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0))


def of_family(table, name):
    return next(value for family, value in table.items() if name.startswith(family))


@published
def test_features_are_those_of_the_published_weights(name):
    x = images(name)
    with torch.no_grad():
        whole = load(name).eval().forward_intermediates(x, intermediates_only=True, output_fmt="NCHW")
        features = load(name, features_only=True).eval()(x)
    features = [f.permute(0, 3, 1, 2) if name.startswith("swin") else f for f in features]
    assert len(features) >= 4
    for tap in features:
        assert any(other.shape == tap.shape and torch.equal(other, tap) for other in whole)


@published
def test_layer_decay_slows_the_stem_and_not_the_head(name):
    model = load(name)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scales.keys() == {id(p) for p in model.parameters()}
    head = scales[id(model.get_parameter(f"{of_family(HEAD, name)}.weight"))]
    stem = scales[id(model.get_parameter(f"{model.default_cfg['first_conv']}.weight"))]
    assert head == 1
    assert stem == min(scales.values()) < 0.2
    model(images(name)).square().sum().backward()
    optimizer.step()


@published
def test_lora_trains_saves_and_merges(name, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=of_family(ADAPTED, name), modules_to_save=[of_family(HEAD, name)])
    model = peft.get_peft_model(load(name), config)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n or "modules_to_save" in n for n in trained)
    x = images(name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):  # the first step moves the second factor alone, which starts at zero
        optimizer.zero_grad()
        model.eval()(x).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(x)
        assert not torch.equal(expected, load(name).eval()(x))
        again = peft.PeftModel.from_pretrained(load(name), tmp_path).eval()
        torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-5)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)
    assert any(isinstance(module, Sugar) for module in merged.modules())
