"""check_gradients: what it finds, what it cannot tell, what it costs, and that it leaves everything as it was."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn

from timm_sugar import Sugar, check_gradients, functional


class Lost(Sugar):
    """SUGAR whose gradient is lost in the model as it stands: what some versions of Dynamo made of it."""

    def forward(self, x):
        return super().forward(x) if functional._reference is not None else torch.relu(x)


def network(*acts: nn.Module, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = []
    for act in acts:
        layers += [nn.Conv2d(3 if not layers else 4, 4, 3, padding=1), nn.BatchNorm2d(4), act, nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def passes(model, *args, **kwargs) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_gradients(model, *args, **kwargs)


@pytest.mark.parametrize("save", ["exact", "uint8", "uint4"])
@pytest.mark.parametrize("name", ["bsilu", "nelu", "gelu", "leaky_relu"])
def test_a_sound_network_passes(name, save):
    passes(network(Sugar(name, save=save), Sugar(name, save=save)), X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bsilu", "gelu"])
def test_under_autocast(name, dtype):
    with torch.autocast("cpu", dtype):
        passes(network(Sugar(name), Sugar(name)), X)
        with pytest.raises(RuntimeError, match=r"^2 passes on ReLU's gradient"):
            check_gradients(network(Lost(name), Sugar(name)), X)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_dropout(backend):
    model = network(Sugar(), Sugar(), dropout=0.3)
    passes(torch.compile(model, backend=backend), X)
    assert model[3].p == 0.3


@pytest.mark.parametrize("lost", [[0], [1], [2], [0, 2], [0, 1, 2]])
def test_the_first_layer_that_lost_its_gradient_is_named(lost):
    acts = [Lost() if i in lost else Sugar() for i in range(3)]
    others = f", and so do {len(lost) - 1} of the others" if len(lost) > 1 else ""
    expected = rf"^{2 + 4 * lost[0]} passes on ReLU's gradient, not its surrogate's{others} \(of 3 SUGAR activations\)"
    with pytest.raises(RuntimeError, match=expected):
        check_gradients(network(*acts), X)


def test_a_gradient_that_is_neither():
    class OtherAlpha(Sugar):
        def forward(self, x):
            alpha = self.alpha if functional._reference is not None else 0.1
            return functional.sugar(x, self.surrogate, alpha)

    with pytest.raises(RuntimeError, match=r"^the gradient that 6 passes on is neither its surrogate's nor ReLU's"):
        check_gradients(network(Sugar(), OtherAlpha(), Sugar()), X)


def test_everything_is_left_as_it_was():
    model = network(Sugar(), Sugar(), dropout=0.5)
    model[0].bias.grad = torch.full((4,), 7.0)
    before, grad = copy.deepcopy(model.state_dict()), model[0].bias.grad
    state = torch.get_rng_state()
    x = X.clone().requires_grad_()
    passes(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model[0].bias.grad is grad
    assert grad.tolist() == [7.0] * 4
    assert [p.grad for name, p in model.named_parameters() if name != "0.bias"] == [None] * 9
    assert x.grad is None
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert functional._reference is None


def test_it_costs_three_passes():
    model, seen = network(Sugar(), Sugar()), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    passes(model, X)
    assert len(seen) == 3


def test_it_works_with_gradients_off_and_in_eval():
    model = network(Sugar(), Sugar()).eval()
    with torch.no_grad():
        passes(model, X)
    assert not model.training


def test_outputs_and_inputs_of_any_structure():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network(Sugar())

        def forward(self, batch, scale=1.0):
            return {"out": [self.inner(batch["x"]) * scale], "labels": torch.arange(3)}

    passes(Net(), {"x": X}, scale=2.0)


def test_a_published_model():
    passes(timm.create_model("resnet18_sugar_bsilu", num_classes=10), torch.randn(4, 3, 32, 32))


@pytest.mark.filterwarnings("ignore:.*torch.jit.:FutureWarning", "ignore:.*torch.jit.:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: network(nn.ReLU()), "no SUGAR activation runs eagerly in this model"),
        (lambda: torch.jit.trace(network(Sugar()), X), "no SUGAR activation runs eagerly in this model"),
        (lambda: torch.jit.script(network(nn.ReLU())), "no SUGAR activation runs eagerly in this model"),
        (lambda: network(Sugar()).requires_grad_(False), "no parameter before a SUGAR activation is trained"),
        (lambda: _only_the_head(network(Sugar())), "no parameter before a SUGAR activation is trained"),
        (
            lambda: network(Sugar("nelu", alpha=1e-6)),
            "as near to ReLU's as this dtype rounds, or not finite, first at 0.weight",
        ),
    ],
)
def test_what_it_cannot_tell_it_says(make, why):
    with pytest.warns(UserWarning, match=f"cannot tell whether the surrogate gradient arrives: .*{why}"):
        check_gradients(make(), X)


def _only_the_head(model):
    model.requires_grad_(False)
    model[-1].requires_grad_(True)
    return model


def test_random_numbers_that_differ_between_calls():
    class Noise(nn.Module):
        generator = torch.Generator().manual_seed(0)

        def forward(self, x):
            return x * (torch.rand(x.shape, generator=self.generator) < 0.5)

    with pytest.warns(UserWarning, match="draws random numbers"):
        check_gradients(network(nn.Sequential(Sugar(), Noise()), Sugar()), X)


@pytest.mark.parametrize("name", ["bsilu", "nelu", "gelu"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_codes_of_many_layers_are_not_taken_for_a_loss(seed, name):
    torch.manual_seed(seed)
    layers = [(nn.Linear(32, 32), Sugar(name, save="uint4")) for _ in range(16)]
    with warnings.catch_warnings():  # it may be unclear
        warnings.simplefilter("ignore")
        check_gradients(nn.Sequential(*(m for pair in layers for m in pair)), torch.randn(16, 32))


def test_one_of_many_layers_in_eval():
    model = timm.create_model("resnet18_sugar_bsilu", num_classes=10).eval()
    model.act1 = Lost()
    with pytest.raises(RuntimeError, match=r"^act1 passes on ReLU's gradient"):
        check_gradients(model, torch.randn(8, 3, 32, 32))


def test_inputs_that_have_a_graph_of_their_own():
    backbone, head = nn.Conv2d(3, 3, 1), network(Sugar())
    passes(head, backbone(X))
    assert backbone.weight.grad is None


def test_an_optimizer_in_the_backward_pass_takes_no_step():
    model = nn.Sequential(nn.Linear(6, 5), Sugar(), nn.Linear(5, 3))
    optimizers = {p: torch.optim.SGD([p], lr=1.0) for p in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    before = [p.detach().clone() for p in model.parameters()]
    images = torch.randn(4, 6)
    check_gradients(model, images)
    assert all(map(torch.equal, before, model.parameters()))
    model(images).sum().backward()  # it goes on stepping afterwards
    assert not any(map(torch.equal, before, model.parameters()))
