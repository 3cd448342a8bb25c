"""Folders that timm and transformers write around a network: what they come back as, and what is refused."""

import json
import warnings
from pathlib import Path

import pytest
import timm
import torch
from transformers import AutoModelForImageClassification, TimmWrapperConfig, TimmWrapperForImageClassification

import timm_sugar
from timm_sugar.cli import main
from timm_sugar.layers import Activation
from timm_sugar.models._weights import unwrap

LOST = "converted without the model of transformers around it"
UNRECORDED = "records no conversion, so that this test_vit has gelu, as timm builds it"
CARD = """---
model-index:
- name: net
  results:
  - task: {type: image-classification}
    dataset: {type: digits, name: digits}
    metrics:
    - {type: accuracy, value: 0.5}
---
"""


def drawn(model: torch.nn.Module) -> torch.nn.Module:
    """Give a network weights with which its activations matter."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.1, generator=generator)
    return model.eval()


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model.eval()(images)
    return getattr(found, "logits", found)


def load(folder: Path, **arguments) -> torch.nn.Module:
    return timm_sugar.create_model(f"local-dir:{folder}", pretrained=True, **arguments)


def wrapper(architecture: str = "test_vit", classes: int = 3) -> TimmWrapperForImageClassification:
    config = TimmWrapperConfig(architecture=architecture, num_labels=classes)
    return drawn(TimmWrapperForImageClassification(config))


@pytest.mark.parametrize("safe", [True, False, "both"])
def test_what_timm_saves_of_a_converted_network(safe, tmp_path):
    model = timm_sugar.convert(drawn(timm.create_model("test_vit", num_classes=3)), "nelu", 0.2)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=safe)
    found = load(tmp_path)
    assert Activation.of(found) == Activation("nelu", 0.2)
    assert torch.equal(logits_of(found), logits_of(model))
    assert found.pretrained_cfg["file"] == str(tmp_path)
    assert found.pretrained_cfg["source"] == "local-dir"
    assert "state_dict" not in found.pretrained_cfg
    other = load(tmp_path, num_classes=7)
    assert other.num_classes == 7
    assert torch.equal(other.patch_embed.proj.weight, model.patch_embed.proj.weight)


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_of_a_pickle_only_tensors_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timm.models.save_for_hf(timm.create_model("test_vit"), "net")
    torch.save({"head.bias": Harmful()}, "net/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is no file of tensors alone.*save model.safetensors"):
        load(Path("net"))
    assert not Path("executed").exists()
    torch.save({"state_dict": {}}, "net/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin holds no state dict"):
        load(Path("net"))
    torch.save({"head.bias": torch.zeros(3)}, "net/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"1,000 numbers in head.bias, and pytorch_model.bin 3"):
        load(Path("net"))


def test_a_conversion_that_config_json_does_not_express_is_refused(tmp_path):
    model = timm.create_model("test_vit", num_classes=3)
    with pytest.warns(UserWarning, match="not part of what a saved model records"):
        timm_sugar.convert(model, "nelu", include="blocks.0.*")
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    with pytest.raises(ValueError, match=r"converted in a way that it does not express.*convert it in the same way"):
        load(tmp_path)
    timm_sugar.convert(model, "nelu")  # all of it now, which can be expressed
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert Activation.of(load(tmp_path)) == Activation("nelu", 0.01)


@pytest.mark.parametrize("surrogate", ["bsilu", "nelu"])
def test_what_transformers_saves_around_a_converted_network(surrogate, tmp_path):
    model = timm_sugar.convert(wrapper(), surrogate, 0.5)
    assert model.sugar_report.recorded
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
        found = load(tmp_path)
    assert Activation.of(found) == Activation(surrogate, 0.5)
    assert torch.equal(logits_of(found), logits_of(model))
    assert "label_names" not in found.pretrained_cfg or found.pretrained_cfg["label_names"] is None
    again = AutoModelForImageClassification.from_pretrained(tmp_path)  # plain ReLU, as stock timm builds it
    assert torch.equal(logits_of(again), logits_of(model))
    timm_sugar.to_relu(model).save_pretrained(tmp_path)
    assert Activation.of(load(tmp_path)) == Activation()
    assert torch.equal(logits_of(load(tmp_path)), logits_of(again))


def test_a_later_conversion_replaces_what_a_package_recorded(tmp_path):
    model = wrapper()
    model.config.timm_sugar = {"architecture": "test_vit", "surrogate": "bsilu", "alpha": 1.67}
    timm_sugar.convert(model, "nelu").save_pretrained(tmp_path)
    assert Activation.of(load(tmp_path)) == Activation("nelu", 0.01)


def test_what_stock_timm_cannot_build_comes_back_here_and_is_refused_there(tmp_path):
    model = timm_sugar.convert(wrapper("test_efficientnet"), "bsilu")
    model.save_pretrained(tmp_path)
    found = load(tmp_path)
    assert Activation.of(found) == Activation("bsilu", 1.67)
    assert torch.equal(logits_of(found), logits_of(model))
    with pytest.raises(TypeError, match="unexpected keyword"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_a_conversion_inside_of_transformers_model_is_not_lost_in_silence(tmp_path):
    model = wrapper()
    timm_sugar.convert(model.timm_model, "nelu")
    with pytest.warns(UserWarning, match=LOST):
        model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=UNRECORDED):
        found = load(tmp_path)
    assert not torch.allclose(logits_of(found), logits_of(model))
    told = load(tmp_path, surrogate="nelu")
    assert torch.equal(logits_of(told), logits_of(model))


def test_other_models_of_transformers_are_refused_with_what_to_do(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_act": "sugar_nelu"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"transformers' vit, which timm does not build; load it with transformers"):
        load(tmp_path)


def test_what_belongs_to_the_file_that_timm_publishes_is_left_out():
    published = {"label_offset": 1, "custom_load": True, "hf_hub_filename": "net.npz", "mean": [0.1, 0.2, 0.3]}
    config = {"model_type": "timm_wrapper", "architecture": "test_vit", "pretrained_cfg": published}
    assert unwrap(config)
    assert config["pretrained_cfg"] == {"mean": [0.1, 0.2, 0.3]}
    assert config["model_args"] == {"img_size": (160, 160)}
    assert not unwrap({"architecture": "test_vit"})


def test_commands_take_a_folder_of_transformers(tmp_path, capsys):
    net = tmp_path / "net"
    timm_sugar.convert(wrapper(classes=10), "nelu").save_pretrained(net)
    assert main(["profile", f"local-dir:{net}", "--data", "digits", "--json"]) == 0
    profile = json.loads(capsys.readouterr().out)
    assert (profile["surrogate"], profile["images"]) == ("nelu", 359)
    (net / "README.md").write_text(CARD)
    assert main(["verify", str(net), "--data", "digits", "--json"]) == 1
    (claim,) = json.loads(capsys.readouterr().out)["claims"]
    assert (claim["claimed"], claim["holds"]) == (0.5, False)
    assert 0 < claim["measured"] < 0.4
    config = json.loads((net / "config.json").read_text())
    (net / "config.json").write_text(json.dumps(config | {"model_args": {"act_layer": "gelu"}}))
    assert main(["verify", str(net), "--data", "digits"]) == 1
    assert "transformers without timm_sugar loads the package as another network" in capsys.readouterr().err
