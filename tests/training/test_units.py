"""Dead units of the training steps: what is counted, and that a run that goes on counts as if it had not stopped."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from timm_sugar.training import TrainConfig, train
from timm_sugar.training.train import build, fit
from timm_sugar.training.units import TrainingUnits


def _network() -> nn.Module:
    """Four units: one dead, one always active, two that are active where the input is positive or negative."""
    network = nn.Sequential(nn.Linear(1, 4), nn.ReLU())
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[0.0], [0.0], [1.0], [-1.0]]))
        network[0].bias.copy_(torch.tensor([-1.0, 1.0, 0.0, 0.0]))
    return network.train()


def test_dead_units_of_an_epoch():
    network, images = _network(), torch.ones(8, 1)
    units = TrainingUnits(network, 40)  # every second is counted
    network(-images)  # the check of the gradient: no pass of the epoch
    units.begin(0, None)
    for _ in range(4):
        network(images)
        network(-images)  # not counted
    network.eval()(-images)
    assert units.dead(units.counts()) == 2 / 4  # the dead one and the one that is active where the input is negative
    units.begin(0, None)
    network.train()(images)
    network(images)
    network(-images)
    assert units.dead(units.counts()) == 1 / 4
    units.detach()
    assert not network._forward_pre_hooks
    assert not network[1]._forward_pre_hooks


@pytest.mark.parametrize("passed", [1, 2, 3])
def test_going_on_counts_as_if_it_had_not_stopped(passed):
    images = [torch.full((8, 1), sign) for sign in (1.0, -1.0, -1.0, -1.0)]
    found = []
    for stops in (False, True):
        network = _network()
        units = TrainingUnits(network, 40)
        units.begin(0, None)
        for number, image in enumerate(images):
            if stops and number == passed:
                kept = json.loads(json.dumps(units.counts()))
                network = _network()
                units = TrainingUnits(network, 40)
                units.begin(passed, kept)
            network(image)
        found.append((units.dead(units.counts()), units.counts()))
    assert found[0] == found[1]
    assert found[0][0] == 1 / 4


def test_an_epoch_that_is_not_known_whole_has_no_value():
    network = _network()
    units = TrainingUnits(network, 40)
    units.begin(2, None)  # a checkpoint of an earlier version
    network(torch.ones(8, 1))
    assert units.dead(units.counts()) is None


@pytest.mark.parametrize("network", [nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1), nn.Softmax(1))])
def test_networks_without_activations(network):
    units = TrainingUnits(network, 40)
    units.begin(0, None)
    assert (units.counts(), units.dead(None)) == (None, None)
    units.detach()


def test_a_run_has_it_by_epoch_and_its_weights_are_the_same(tmp_path, monkeypatch):
    config = TrainConfig(
        data="digits", model="resnet18_sugar_bsilu", img_size=32, epochs=2, limit_train=96, limit_val=40,
        limit_test=40, batch_size=32, output=str(tmp_path / "with"), mixed_precision="no",
    )  # fmt: skip
    run = build(config)
    with torch.no_grad():  # half of the first activation is dead, and stays so
        run.network.bn1.weight[:32] = 0.0
        run.network.bn1.bias[:32] = -100.0
    run.config.folder.mkdir()
    fit(run)
    lines = [json.loads(line) for line in (tmp_path / "with/metrics.jsonl").read_text().splitlines()]
    blocks = [m for m in run.network.modules() if hasattr(m, "act2")]
    first = 32 / (64 + sum(m.bn1.num_features + m.bn2.num_features for m in blocks))
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(first <= line["train_dead_units"] < 1 for line in lines)
    assert not run.network._forward_pre_hooks
    without = dataclasses.replace(config, output=str(tmp_path / "without"))
    train(dataclasses.replace(config, output=str(tmp_path / "again")))
    monkeypatch.setattr("timm_sugar.training.passes.TrainingUnits", lambda network, passes: TrainingUnits(network, 0))
    train(without)
    same = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("again", "without")]
    assert same[0] == same[1]
