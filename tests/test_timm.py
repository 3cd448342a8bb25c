"""The private parts of timm: each is there and does what it is used for, so that a new timm fails here first."""

import ast
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.layers import create_act
from timm.models import _features, _hub, vgg
from timm.scheduler import create_scheduler_v2

from timm_sugar import _timm

PACKAGE = Path(_timm.__file__).parent


def test_activation_tables_are_those_that_the_factories_read(monkeypatch):
    for table in (_timm.ACT_LAYERS, _timm.ACT_FUNCTIONS):
        monkeypatch.setitem(table, "of_this_test", torch.nn.ReLU)
    assert create_act.get_act_layer("of_this_test") is torch.nn.ReLU
    assert create_act.get_act_fn("of_this_test") is torch.nn.ReLU


def test_a_config_is_read_as_timm_reads_it():
    config = {"architecture": "resnet18", "num_classes": 7, "model_args": {"drop_rate": 0.5}, "pretrained_cfg": {}}
    cfg, architecture, model_args = _timm.parse_model_config(config)
    assert (architecture, model_args, cfg["num_classes"]) == ("resnet18", {"drop_rate": 0.5}, 7)
    assert _timm.save_config_for_hf is _hub.save_config_for_hf


def test_model_arguments_are_what_a_saved_model_comes_back_with(tmp_path):
    model = timm.create_model("resnet18", act_layer="gelu", num_classes=3, device="meta")
    assert _timm.model_args(model)["act_layer"] == "gelu"
    assert _timm.model_args(torch.nn.Linear(1, 1)) is None
    _timm.set_model_args(model, {"act_layer": "silu"})
    _timm.save_config_for_hf(model, str(tmp_path / "config.json"))
    assert '"act_layer": "silu"' in (tmp_path / "config.json").read_text()


def test_checkpoints_of_vgg_in_torchvisions_names():
    weights = {"classifier.0.weight": torch.zeros(4096, 512 * 49), "features.0.weight": torch.zeros(64, 3, 3, 3)}
    names = {name: tensor.shape for name, tensor in _timm.convert_vgg_checkpoint(weights).items()}
    assert names == {"pre_logits.fc1.weight": (4096, 512, 7, 7), "features.0.weight": (64, 3, 3, 3)}
    assert vgg._filter_fn


def test_features_are_chosen_as_in_timm():
    assert _timm.feature_take_indices(4, [-1, 1]) == ([3, 1], 3)
    assert _timm.feature_take_indices is _features.feature_take_indices


def test_a_multistep_schedule_decays_at_its_milestone():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = create_scheduler_v2(
        optimizer, sched="multistep", num_epochs=3, decay_milestones=[1], decay_rate=0.1, step_on_epochs=False,
        updates_per_epoch=2, warmup_epochs=0,
    )[0]  # fmt: skip
    _timm.shift_milestones(scheduler)
    rates = []
    for step in range(4):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.1])


def test_an_operation_of_an_augmentation_is_replaced():
    transform = create_transform((3, 8, 8), is_training=True, auto_augment="rand-m9")
    of_posterize = [op for op in _timm.augment_ops(transform.transforms) if op.aug_fn is auto_augment.posterize]
    _timm.replace_augmentation(transform.transforms, auto_augment.posterize, lambda image, *args, **kwargs: "replaced")
    (op,) = of_posterize
    assert op.aug_fn(Image.new("RGB", (1, 1))) == "replaced"


def test_no_other_file_reaches_into_timm():
    """Imports of private modules and names of timm, and the attributes that `_timm` is for."""
    attributes = {"_model_args", "decay_t", "aug_fn"}
    for path in PACKAGE.rglob("*.py"):
        if path.name == "_timm.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "timm":
                parts = [*node.module.split("."), *(alias.name for alias in node.names)]
                assert not [part for part in parts if part.startswith("_")], f"{path}:{node.lineno}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in attributes, f"{path}:{node.lineno}"
