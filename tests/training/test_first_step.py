"""The guard before the first step, and the record of how gradients are computed."""

import sys
import warnings

import pytest
import torch
import yaml
from accelerate import Accelerator

from timm_sugar import functional, layers
from timm_sugar.training import TrainConfig, train
from timm_sugar.training.first_step import path_of
from timm_sugar.training.folder import check_unchanged

SMALL = dict(
    data="digits", model="resnet18_cifar_sugar_bsilu", model_args={"channels": [8, 8, 8, 8]}, img_size=16,
    epochs=1, batch_size=32, limit_train=64, limit_val=32,
)  # fmt: skip


def config(tmp_path, **more) -> TrainConfig:
    return TrainConfig(**{**SMALL, "output": str(tmp_path / "run"), **more})


@pytest.mark.parametrize("more", [{}, {"mixed_precision": "bf16", "channels_last": True}, {"act_layer": "relu"}])
def test_a_sound_run_says_how_its_gradients_are_computed(tmp_path, more):
    train(config(tmp_path, **more))
    record = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert record["gradients"] == (None if more.get("act_layer") == "relu" else "cpp")


def test_a_run_whose_gradient_is_lost_is_not_trained(tmp_path, monkeypatch):
    lost = functional.activate

    def forward(self, x):
        return lost(x, self.surrogate, self.alpha, self.save) if functional._reference else torch.relu(x)

    monkeypatch.setattr(layers.Sugar, "forward", forward)
    with pytest.raises(ValueError, match=r"^not trained: act1 passes on ReLU's gradient, not its surrogate's"):
        train(config(tmp_path))
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert not [*(tmp_path / "run").glob("checkpoints/*")]


def test_the_check_changes_nothing(tmp_path, monkeypatch):
    first = train(config(tmp_path, model_args={"channels": [8, 8, 8, 8], "drop_path_rate": 0.2}))
    monkeypatch.setattr(sys.modules["timm_sugar.training.train"], "check_first_step", lambda *_: None)
    other = config(
        tmp_path, output=str(tmp_path / "other"), model_args={"channels": [8, 8, 8, 8], "drop_path_rate": 0.2}
    )
    second = train(other)
    assert first["test_loss"] == second["test_loss"]
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("run", "other")]
    assert weights[0] == weights[1]


def test_going_on_by_another_way_is_said_in_one_line():
    record = dict.fromkeys(TrainConfig.__dataclass_fields__) | {"processes": 1}
    with pytest.warns(UserWarning, match="^output/x: gradients were computed by cpp, from here on by composed$"):
        check_unchanged("output/x", record | {"gradients": "cpp"}, record | {"gradients": "composed"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_unchanged("output/x", record | {"gradients": "cpp"}, record | {"gradients": "cpp"})
        check_unchanged("output/x", record, record | {"gradients": "cpp"})


@pytest.mark.parametrize(
    ("save", "compiled", "path"), [("exact", False, "cpp"), ("uint8", False, "cpp"), ("exact", True, "torch.compile")]
)
def test_paths(tmp_path, save, compiled, path):
    network = torch.nn.Sequential(layers.Sugar(save=save))
    assert path_of(config(tmp_path, compile=compiled), network, Accelerator(cpu=True).device) == path
