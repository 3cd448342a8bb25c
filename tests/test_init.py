"""Randomised asymmetric initialisation: distribution, layers reached, determinism."""

import math

import pytest
import torch
from torch import nn

import timm_sugar.init
from timm_sugar.init import pytorch_default_, randomized_asymmetric_


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(layer: nn.Module) -> torch.Tensor:
    return torch.cat((layer.weight.flatten(1), layer.bias[:, None]), 1).detach()


def replay(layer: nn.Module, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of the layer beside a run with the same draws, which reveals the replaced place of each row."""
    normal = torch.empty_like(rows_of(layer)).normal_(std=0.6007 / math.sqrt(layer.weight[0].numel()), generator=seed)
    return rows_of(layer), normal


@pytest.mark.parametrize("layer", [nn.Linear(9, 20_000), nn.Conv2d(1, 20_000, 3)], ids=["linear", "conv"])
def test_one_entry_of_each_row_is_beta_and_the_others_are_normal(layer):
    randomized_asymmetric_(layer, generator(1))
    rows, normal = replay(layer, generator(1))
    changed = rows != normal
    assert changed.sum(1).eq(1).all()  # the place is uniform over weights and bias
    share = changed.double().mean(0)
    assert share.sub(1 / 10).abs().max() < 5 * math.sqrt(0.09 / 20_000)

    beta = rows[changed].double()
    assert beta.min() >= 0
    assert beta.max() <= 1
    # Beta(2, 1): mean 2/3, variance 1/18, P(beta < 1/2) = 1/4
    assert beta.mean() == pytest.approx(2 / 3, abs=5 * math.sqrt(1 / 18 / 20_000))
    assert beta.var() == pytest.approx(1 / 18, rel=0.05)
    assert (beta < 0.5).double().mean() == pytest.approx(1 / 4, abs=5 * math.sqrt(3 / 16 / 20_000))

    rest = rows[~changed].double()
    assert rest.std() == pytest.approx(0.6007 / 3, rel=0.01)
    assert abs(rest.mean()) < 5 * 0.6007 / 3 / math.sqrt(rest.numel())


def test_without_bias_every_row_has_its_beta_entry_in_the_weight():
    layer = nn.Linear(4, 5000, bias=False)
    randomized_asymmetric_(layer, generator())
    normal = torch.empty(5000, 4).normal_(std=0.6007 / 2, generator=generator())
    assert (layer.weight != normal).sum(1).eq(1).all()


def test_reaches_nested_layers_and_leaves_the_rest():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Flatten(), nn.Linear(16, 2)))
    nn.init.constant_(model[1].weight, 7.0)
    before = [p.detach().clone() for p in model.parameters()]
    assert randomized_asymmetric_(model, generator()) is model
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert changed == [True, True, False, False, True, True]
    assert all(p.requires_grad and p.grad_fn is None for p in model.parameters())


def test_same_generator_state_gives_same_weights_and_the_default_one_is_used_without():
    first, second = (randomized_asymmetric_(nn.Linear(3, 4), generator(5)) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        third = timm_sugar.init.randomized_asymmetric_(nn.utils.skip_init(nn.Linear, 3, 4))
    assert torch.equal(first.weight, third.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keeps_dtype(dtype):
    layer = randomized_asymmetric_(nn.Linear(3, 4, dtype=dtype), generator())
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.weight.isfinite().all()


def test_pytorchs_default_is_uniform_over_fan_in_and_leaves_the_rest():
    network = nn.Sequential(nn.Conv2d(16, 64, 3), nn.BatchNorm2d(64), nn.Linear(400, 300))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(7.0)
    torch.manual_seed(0)
    assert pytorch_default_(network) is network
    torch.manual_seed(0)
    other = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Linear(400, 300))
    for ours, theirs in ((network[0], other[0]), (network[2], other[1])):
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)
        fan_in = ours.weight[0].numel()
        assert ours.weight.abs().max().item() <= fan_in**-0.5
        assert ours.weight.var().item() == pytest.approx(1 / (3 * fan_in), rel=0.05)
    assert network[1].weight.eq(7).all()
    with pytest.raises(ValueError, match="ReLU has no linear or convolutional layer"):
        pytorch_default_(nn.ReLU())


def test_module_without_layers_is_an_error():
    with pytest.raises(ValueError, match="LayerNorm has no linear or convolutional layer"):
        randomized_asymmetric_(nn.LayerNorm(3))


def test_fewer_deep_networks_are_born_dead():
    def born_dead(initialise) -> int:
        count = 0
        for seed in range(40):
            net = nn.Sequential(*(m for i in range(10) for m in (nn.Linear(2 if i else 1, 2), nn.ReLU())))
            initialise(net, generator(seed))
            x = torch.linspace(-1.7, 1.7, 101)[:, None]
            count += not net(x).any()
        return count

    def he(net: nn.Module, generator: torch.Generator) -> None:
        for layer in net[::2]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)

    assert born_dead(randomized_asymmetric_) < 20 < 32 < born_dead(he)
