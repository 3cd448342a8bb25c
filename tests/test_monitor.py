"""`DeadUnitMonitor` against counts made by hand and against `count_units`, in every way that a loop runs a network."""

import copy
import gc
import io
import pickle
import socket
import warnings

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

import timm_sugar
from timm_sugar import DeadUnitMonitor, monitor
from timm_sugar.analysis import count_units, profile, revived_units


class Signs(nn.Module):
    """Units 0 and 1 are active for inputs above and below 0, unit 2 never, unit 3 always."""

    def __init__(self, activation=nn.ReLU):
        super().__init__()
        self.linear, self.act = nn.Linear(1, 4), activation()
        with torch.no_grad():
            self.linear.weight[:, 0] = torch.tensor([1.0, -1.0, 0.0, 0.0])
            self.linear.bias[:] = torch.tensor([0.0, 0.0, -1.0, 1.0])

    def forward(self, x):
        return self.act(self.linear(x))


class Blocks(nn.Module):
    """Two blocks of which each may be checkpointed, with an activation that is called twice in the first."""

    def __init__(self, reentrant: bool | None = None):
        super().__init__()
        self.reentrant = reentrant
        self.stem, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, padding=1)
        self.act, self.head = timm_sugar.Sugar(), nn.Linear(6, 2)

    def first(self, x):
        return self.relu(self.norm(self.relu(x)) - 0.1)

    def second(self, x):
        return self.act(self.conv(x))

    def forward(self, x):
        x = self.stem(x)
        for block in (self.first, self.second):
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


def batches(count=3, shape=(4, 3, 8, 8)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def train(run, inputs):
    for x in inputs:
        run(x).float().sum().backward()


def assert_same_counts(found: monitor.Activity, model: nn.Module, inputs, passes=None) -> None:
    """Compare with `count_units` on a twin that is in training too."""
    with torch.no_grad(), count_units(model.train()) as expected:
        for x in inputs:
            model(x)
    layers = expected.layers
    assert [layer.name for layer in found.layers] == [*layers]
    for layer in found.layers:
        seen = layers[layer.name].seen // layer.units
        active = torch.tensor(layer.probability, dtype=torch.float64) * seen
        torch.testing.assert_close(active, layers[layer.name].units.double(), rtol=2e-4, atol=0.02)
        assert layer.kind == layers[layer.name].kind
    assert found.dead_units == expected.dead_units
    assert found.sparsity == pytest.approx(expected.sparsity, abs=1e-12)


@pytest.mark.parametrize("activation", [nn.ReLU, timm_sugar.Sugar, nn.GELU, lambda: nn.ReLU(inplace=True)])
def test_counts_made_by_hand(activation):
    model = Signs(activation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch = DeadUnitMonitor(model, window=3, every=1, nearly_dead=0.2, warn_above=None)
    for x in ([[9.0], [9.0]], [[1.0], [-1.0]], [[2.0], [0.0]], [[3.0], [4.0]]):
        model(torch.tensor(x)).sum().backward()
    found = watch.summary()  # of the last three: 1 -1 2 0 3 4
    layer = found.layers[0]
    assert (found.steps, found.counted_steps, found.images) == (3, 3, 6)
    assert layer.probability == [0.6667, 0.1667, 0.0, 1.0]
    assert (layer.name, layer.units, layer.dead, layer.nearly_dead, layer.always_active) == ("act", 4, 1, 1, 1)
    assert (found.dead_units, found.nearly_dead, found.always_active) == (0.25, 0.25, 0.25)
    assert found.sparsity == layer.sparsity == pytest.approx(1 - 11 / 24)
    assert found.not_seen == []
    assert "act" in str(found)
    assert "dead units 25.00%, sparsity 54.2%; 3 of 3 training passes counted, 6 images" in str(found)


def test_channels_of_a_convolution_in_both_memory_orders():
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU()).to(memory_format=memory_format)
        with torch.no_grad():
            model[0].weight[:] = torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1, 1)
            model[0].bias.zero_()
        watch = DeadUnitMonitor(model, every=1)
        x = torch.zeros(300, 1, 2, 2)  # more images than a byte counts
        x[:299, 0, 0, 0], x[299, 0, 1, 1] = 1.0, -1.0
        model(x.contiguous(memory_format=memory_format)).sum().backward()
        assert watch.summary().layers[0].probability == [float(f"{n / 1200:.4g}") for n in (299, 1, 0)]


NETWORKS = {
    "resnet": lambda: timm.create_model("test_resnet", num_classes=3),
    "vit": lambda: timm.create_model("test_vit", num_classes=3, img_size=32),
    "convnext": lambda: timm.create_model("test_convnext", num_classes=3),
    "swin": lambda: torchvision.models.SwinTransformer([2, 2], 16, [1, 1], [2, 2], [4, 4], num_classes=3),
    "sugar": lambda: timm_sugar.convert(timm.create_model("test_resnet", num_classes=3), "nelu"),
    "blocks": Blocks,
}


@pytest.mark.filterwarnings("ignore:the conversion is not part")
@pytest.mark.parametrize("how", ["plain", "autocast", "channels_last"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_numbers_as_count_units(name, how):
    torch.manual_seed(0)
    model, inputs = NETWORKS[name](), batches(2, (3, 3, 32, 32))
    if how == "channels_last":
        model, inputs = (
            model.to(memory_format=torch.channels_last),
            [x.to(memory_format=torch.channels_last) for x in inputs],
        )
    twin = copy.deepcopy(model)
    watch = DeadUnitMonitor(model, every=1)
    with torch.random.fork_rng(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        torch.manual_seed(1)
        train(model, inputs)
        torch.manual_seed(1)
        assert_same_counts(watch.summary(), twin, inputs)


def test_a_profile_and_a_summary_name_the_same_things():
    model, inputs = Blocks(), batches()
    before = profile(model, inputs)
    watch = DeadUnitMonitor(model, every=1)
    train(model, inputs)
    rows = revived_units(before.to_dict(), watch.summary().to_dict())
    assert [row["name"] for row in rows] == ["relu", "relu:2", "act"]


def test_every_so_many_steps_are_counted_and_the_window_is_the_last_ones():
    model = Signs()
    watch = DeadUnitMonitor(model, window=4, every=2, warn_above=None)
    signs = [1, -1, 1, -1, -1, 1, 1, 1]  # counted are the 1st, 3rd, 5th and 7th
    found = []
    for sign in signs:
        model(torch.full((2, 1), float(sign)))
        found.append(watch.summary())
    assert [(s.steps, s.counted_steps, s.images) for s in found[:5]] == [
        (1, 1, 2),
        (2, 1, 2),
        (3, 2, 4),
        (4, 2, 4),
        (4, 2, 4),
    ]
    assert [s.layers[0].probability[0] for s in found] == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]
    assert watch.steps == 8


def test_without_a_window_it_is_everything_since_the_last_reset():
    model = Signs()
    watch = DeadUnitMonitor(model, window=None, every=1, warn_above=None)
    for sign in (1.0, -1.0, -1.0, -1.0):
        model(torch.full((2, 1), sign))
    found = watch.summary()
    assert (found.layers[0].probability[:2], found.steps, found.counted_steps) == ([0.25, 0.75], 4, 4)
    watch.reset()
    with pytest.raises(RuntimeError, match=r"no training pass of Signs was counted: it is to be called in train\(\)"):
        watch.summary()
    model(torch.ones(2, 1))
    assert watch.summary().layers[0].probability[:2] == [1.0, 0.0]


def test_only_training_passes_are_counted():
    model = Signs()
    watch = DeadUnitMonitor(model, every=1)
    model(torch.ones(2, 1))
    model.eval()
    model(-torch.ones(2, 1))
    with torch.inference_mode():
        model(-torch.ones(2, 1))
    model.train()
    assert (watch.summary().layers[0].probability[1], watch.steps) == (0.0, 1)
    with torch.inference_mode():  # training mode, as where statistics of BatchNorm are measured again
        model(-torch.ones(2, 1))
    assert watch.summary().layers[0].probability[1] == 0.5


def test_a_vector_is_one_image():
    model = nn.Sequential(nn.Linear(1, 3), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [-1.0], [1.0]]))
        model[0].bias.zero_()
    watch = DeadUnitMonitor(model, every=1)
    with count_units(model) as counts:
        model(torch.ones(1))
    (layer,) = watch.summary().layers
    assert (layer.units, list(layer.probability), watch.summary().images) == (3, [1, 0, 1], 1)
    assert (counts.layers["1"].images, counts.layers["1"].units.tolist()) == (1, [1, 0, 1])


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_an_image_without_a_batch_dimension_is_one_image(dimensions):
    convolution, norm = getattr(nn, f"Conv{dimensions}d"), getattr(nn, f"InstanceNorm{dimensions}d")
    torch.manual_seed(0)
    model = nn.Sequential(convolution(2, 6, 3), norm(6), nn.ReLU(), convolution(6, 4, 1), nn.ReLU())
    with torch.no_grad():
        model[0].weight[1] = model[3].weight[2] = 0
        model[0].bias[1] = model[3].bias[2] = -1
    image = torch.randn(1, 2, *[9] * dimensions)
    found = []
    for x in (image, image[0]):
        watch = DeadUnitMonitor(model, every=1)
        with count_units(model) as counts:
            model(x)
        layers = {name: (layer.images, layer.units.tolist()) for name, layer in counts.layers.items()}
        summary = watch.summary()
        found.append((summary.images, [(layer.units, [*layer.probability]) for layer in summary.layers], layers))
        watch.detach()
    assert found[0] == found[1]
    assert [units for units, _ in found[0][1]] == [6, 4]
    assert found[0][0] == 1


class TwoLayouts(nn.Module):
    """An activation before any layer of its rank, and a layer that leaves another layout behind."""

    def __init__(self):
        super().__init__()
        self.first, self.linear, self.second = nn.ReLU(), nn.Linear(6, 6), nn.ReLU()
        self.convolution, self.third = nn.Conv2d(2, 3, 3), nn.ReLU()

    def forward(self, x):
        y = self.second(self.linear(self.first(x)))
        return self.third(self.convolution(y.reshape(-1, 2, 6, 6)[0]))


def test_the_layout_is_reset_before_each_pass():
    model = TwoLayouts()
    watch = DeadUnitMonitor(model, every=1)
    for _ in range(2):
        with count_units(model) as counts:
            model(torch.randn(4, 24, 6))
    assert [layer.units for layer in watch.summary().layers] == [6, 6, 3]
    assert [len(layer.units) for layer in counts.layers.values()] == [6, 6, 3]


def test_batch_norm_after_an_image_without_a_batch_dimension():
    pool = [nn.AdaptiveAvgPool1d(1), nn.Flatten(0), nn.Unflatten(0, (1, 8))]
    model = nn.Sequential(nn.Conv1d(3, 8, 3), *pool, nn.BatchNorm1d(8), nn.ReLU()).eval()
    with torch.no_grad(), count_units(model) as counts:
        model(torch.randn(3, 10))
    assert [len(layer.units) for layer in counts.layers.values()] == [8]


def test_inputs_of_other_ranks_are_refused_in_one_line():
    model = nn.Sequential(nn.ReLU())
    with count_units(model):
        model(torch.randn(2, 3))
        with pytest.raises(ValueError, match="1 and 2 dimensions besides the batch"):
            model(torch.randn(2, 3, 4))


def test_an_empty_batch_counts_nothing():
    model = Signs()
    watch = DeadUnitMonitor(model, every=1)
    model(torch.ones(0, 1))
    with pytest.raises(RuntimeError, match="no training pass"):
        watch.summary()
    model(torch.ones(2, 1))
    assert (watch.summary().images, watch.summary().steps) == (2, 2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_checkpointing_computes_again_is_not_counted(reentrant):
    torch.manual_seed(0)
    model = Blocks(reentrant)
    twin = copy.deepcopy(model)
    twin.reentrant = None
    watch = DeadUnitMonitor(model, every=1)
    with torch.random.fork_rng():
        train(model, [x.requires_grad_() for x in batches()])
    assert_same_counts(watch.summary(), twin, batches())
    with watch.step():  # the backward pass lies inside
        train(model, batches(1))
    assert watch.summary().layers[0].name == "relu"
    assert [layer.name for layer in watch.summary().layers] == ["relu", "relu:2", "act"]


def _compiled(how: str, model: nn.Module, backend: str):
    if how == "in_place":
        model.compile(backend=backend, fullgraph=True)
        return model
    if how == "inside_of_a_step":
        return torch.compile(lambda x: model(x) * 2, backend=backend, fullgraph=True)
    if how == "in_parts":
        model.first = torch.compile(model.first, backend=backend)
        model.second = torch.compile(model.second, backend=backend)
        return model
    return torch.compile(model, backend=backend, fullgraph=True)


@pytest.mark.parametrize("reentrant", [None, False])
@pytest.mark.parametrize("attached", ["before", "after"])
@pytest.mark.parametrize("how", ["wrapped", "in_place", "inside_of_a_step", "in_parts"])
def test_compiled(how, attached, reentrant):
    if reentrant is False and torch.__version__ < "2.9":
        pytest.skip("the operator in a checkpointed part raises an error in the backward pass there")
    check_compiled(how, attached, reentrant, "aot_eager")


def check_compiled(how: str, attached: str, reentrant: bool | None, backend: str) -> None:
    torch.manual_seed(0)
    model = Blocks(reentrant)
    twin = copy.deepcopy(model)
    twin.reentrant = None
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, about its parts
        watch = DeadUnitMonitor(model, every=1) if attached == "before" else None
        run = _compiled(how, model, backend)
        if watch is None:
            train(run, batches(1))
            watch = DeadUnitMonitor(run if isinstance(run, nn.Module) else model, every=1)
        model.eval()
        run(batches(1)[0])
        model.train()
        train(run, batches())
        twin.norm.load_state_dict(model.norm.state_dict())
        assert_same_counts(watch.summary(), twin, batches())
        watch.detach()
        counted = watch.summary()
        with torch._dynamo.utils.preserve_rng_state():
            train(run, batches(1))
    assert watch.summary() == counted
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_by_inductor():
    check_compiled("wrapped", "after", None, "inductor")


def test_networks_that_share_compiled_code_are_told_apart():
    torch.compiler.reset()
    gc.collect()  # monitors of other tests that were not detached
    first, second = Signs(), Signs()
    watch = DeadUnitMonitor(second, every=1)
    assert torch._dynamo.config.skip_nnmodule_hook_guards is False
    compiled = [torch.compile(model, backend="eager") for model in (first, second)]
    for _ in range(2):
        for run in compiled:
            run(torch.ones(2, 1))
    assert watch.summary().counted_steps == 2
    watch.detach()
    assert torch._dynamo.config.skip_nnmodule_hook_guards is True
    watch = DeadUnitMonitor(Signs())
    del watch
    gc.collect()
    assert torch._dynamo.config.skip_nnmodule_hook_guards is True
    torch.compiler.reset()


def test_a_pass_without_any_activation_says_so():
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU())
    watch = DeadUnitMonitor(model, every=1)
    hooks, model[1]._forward_pre_hooks = model[1]._forward_pre_hooks, {}
    with pytest.raises(RuntimeError, match="1 was replaced after DeadUnitMonitor was attached"):
        model(torch.ones(2, 1))
    model[1]._forward_pre_hooks = hooks
    with (
        pytest.raises(RuntimeError, match="no activation of Sequential ran where DeadUnitMonitor sees it"),
        watch.step(),
    ):
        model[0](torch.ones(2, 1))


def test_a_detached_network_is_as_it_was():
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, activation=F.gelu, dropout=0.0)
    before = {name: {k: copy.copy(v) for k, v in vars(m).items()} for name, m in model.named_modules()}
    keys = [*model.state_dict()]
    watch = DeadUnitMonitor(model, every=1)
    assert [*model.state_dict()] == keys
    train(model, [torch.randn(3, 5, 8)])
    assert [(layer.name, layer.kind, layer.units) for layer in watch.summary().layers] == [("activation", "gelu", 12)]
    watch.detach()
    watch.detach()
    assert model.activation is F.gelu
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(not v for k, v in vars(module).items() if "hooks" in k)
    assert watch.summary().steps == 1


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_not_monitored(copied):
    model = nn.Sequential(Signs(), nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, activation=F.gelu))
    watch = DeadUnitMonitor(model, every=1)
    if copied == "deepcopy":
        twin = copy.deepcopy(model)
    elif copied == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    x = torch.ones(2, 3, 1)
    twin(x)
    assert twin[1].activation is F.gelu
    assert watch.steps == 0
    model(x)
    twin(-x)
    assert (watch.steps, watch.summary().layers[0].probability[:2]) == (1, [1.0, 0.0])
    own = DeadUnitMonitor(twin, every=1)
    twin(-x)
    assert own.summary().layers[0].probability[:2] == [0.0, 1.0]


def test_two_monitors_and_count_units_at_once():
    model = Signs()
    first, second = DeadUnitMonitor(model, every=1), DeadUnitMonitor(model, every=1)
    model(torch.ones(2, 1))
    first.detach()
    with torch.no_grad(), count_units(model) as counts:
        model(torch.ones(2, 1))
    assert (first.summary().steps, second.summary().steps, counts.layers["act"].images) == (1, 2, 2)


def test_two_monitors_of_a_function_leave_in_either_order():
    model = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, activation=F.gelu)
    first, second = DeadUnitMonitor(model, every=1), DeadUnitMonitor(model, every=1)
    first.detach()
    model(torch.ones(2, 3, 4))
    assert (first.steps, second.summary().images) == (0, 2)
    second.detach()
    assert model.activation is F.gelu


def test_layers_that_are_called_by_keyword():
    class ByKeyword(Signs):
        def __init__(self):
            super().__init__()
            self.function = F.relu

        def forward(self, x):
            return self.function(input=self.act(input=self.linear(input=x)))

    model = ByKeyword()
    watch = DeadUnitMonitor(model, every=1)
    with count_units(model) as counts:
        model(torch.tensor([[1.0], [2.0], [-1.0], [3.0]]))
    layers = {layer.name: layer.probability for layer in watch.summary().layers}
    assert layers == {name: [0.75, 0.25, 0.0, 1.0] for name in ("act", "function")}
    assert {name: layer.units.tolist() for name, layer in counts.layers.items()} == {
        name: [3, 1, 0, 4] for name in layers
    }


@pytest.mark.filterwarnings("ignore:the conversion is not part")
def test_converted_after_it_was_attached():
    model = Signs()
    watch = DeadUnitMonitor(model, every=1)
    timm_sugar.convert(model, "nelu")
    model(torch.ones(2, 1))
    assert (watch.summary().layers[0].kind, watch.summary().layers[0].probability[0]) == ("sugar", 1.0)
    watch.detach()
    assert not model.act._forward_pre_hooks
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, activation=F.gelu)
    watch = DeadUnitMonitor(layer, every=1)
    timm_sugar.convert(layer)
    with pytest.raises(
        RuntimeError, match="activation was replaced after DeadUnitMonitor was attached: attach it again"
    ):
        layer(torch.ones(2, 3, 4))
    watch.detach()
    assert isinstance(layer.activation, timm_sugar.Sugar)


def test_it_warns_once_of_dead_units():
    model = Signs()
    DeadUnitMonitor(model, window=2, every=1, warn_above=0.4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(8):
            model(torch.ones(2, 1))  # units 1 and 2 are dead
    assert [str(w.message) for w in caught] == [
        "50% of the units of Signs were dead in 2 training steps; DeadUnitMonitor.summary() says where"
    ]
    model = Signs()
    DeadUnitMonitor(model, window=2, every=1, warn_above=0.5)  # not more than that
    for _ in range(8):
        model(torch.ones(2, 1))


def test_a_model_that_was_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1, 4), nn.ReLU())
    watch = DeadUnitMonitor(model, every=1)
    model.to_empty(device="cpu").load_state_dict(nn.Linear(1, 4).state_dict(prefix="0."))
    torch.compiler.reset()
    torch.compile(model, backend="eager")(torch.ones(2, 1))
    assert watch.summary().images == 2


def test_dead_units_may_come_later():
    model = Signs()
    DeadUnitMonitor(model, window=2, every=1, warn_above=0.4)
    for x in (1.0, -1.0, 1.0, -1.0, 1.0, 1.0):
        model(torch.full((2, 1), x))
    with pytest.warns(UserWarning, match="50% of the units"):
        model(torch.ones(2, 1))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_what_cannot_be_seen_is_said():
    class Called(Signs):
        def forward(self, x):
            return F.relu(super().forward(x))

    with pytest.warns(UserWarning, match="DeadUnitMonitor cannot see relu in the forward of Called"):
        DeadUnitMonitor(Called())
    scripted = torch.jit.script(nn.Sequential(nn.Linear(1, 2), nn.ReLU()))
    with pytest.raises(ValueError, match="no activation module or attribute to monitor; those of a scripted"):
        DeadUnitMonitor(scripted)
    with pytest.raises(ValueError, match="use DistributedDataParallel"):
        DeadUnitMonitor(nn.DataParallel(Signs()))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_scripted_and_traced():
    model = Signs()
    watch = DeadUnitMonitor(model, every=1)
    with pytest.raises(AttributeError, match="cannot be scripted: detach DeadUnitMonitor first"):
        torch.jit.script(model)
    traced = torch.jit.trace(model, torch.ones(2, 1), check_trace=False)
    assert watch.steps == 0
    assert "gt" not in str(traced.graph)
    watch.detach()
    torch.jit.script(model)


def test_an_activation_that_does_not_run_is_named():
    model = Signs()
    model.spare = nn.ReLU()
    watch = DeadUnitMonitor(model, every=1)
    model(torch.ones(2, 1))
    assert watch.summary().not_seen == ["spare"]
    assert str(watch.summary()).endswith("not seen: spare")


def test_other_ways_to_call_the_network():
    model = timm.create_model("test_resnet")
    watch = DeadUnitMonitor(model, every=1)
    x = torch.randn(2, 3, 32, 32)
    with pytest.warns(UserWarning, match=r"conv1.2 runs outside of a call of ResNet, .*with monitor.step\(\)"):
        model.forward_features(x)
    assert watch.steps == 0
    for _ in range(2):
        with watch.step():
            model.forward_features(x).sum().backward()
            model(x)
    found = watch.summary()
    assert (found.steps, found.counted_steps, found.images) == (2, 2, 4)
    assert len(found.layers) == 2 * 12
    assert found.layers[-1].name.endswith(":2")


def test_a_pass_that_fails_is_not_counted():
    model = nn.Sequential(Signs(), nn.Linear(4, 1))
    watch = DeadUnitMonitor(model, every=1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.ones(2, 3))
    model[1].requires_grad_(False)
    broken, model[1] = model[1], nn.Linear(5, 1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(-torch.ones(2, 1))
    model[1] = broken
    model(torch.ones(2, 1))
    assert watch.summary().layers[0].probability == [1.0, 0.0, 0.0, 1.0]


def test_units_that_change_are_refused():
    model = nn.Sequential(nn.LayerNorm(1), nn.ReLU())
    watch = DeadUnitMonitor(nn.Sequential(nn.Flatten(2), nn.ReLU()), every=1)
    for width in (2, 3):
        watch.model(torch.ones(4, 1, width))
    with pytest.raises(RuntimeError, match="1 had different numbers of units in the passes counted"):
        watch.summary()
    assert model is not None


def test_inside_of_a_cuda_graph_it_says_so(monkeypatch):
    class OnGPU(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model = Signs()
    DeadUnitMonitor(model)
    model(torch.ones(2, 1))
    with pytest.raises(RuntimeError, match="cannot count inside of a CUDA graph"):
        model(torch.ones(2, 1).as_subclass(OnGPU))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"every": 1.5}, "every must be a whole number of at least 1, got 1.5"),
        ({"window": 4}, "a window of 4 steps may hold none that is counted: every is 5"),
        ({"nearly_dead": 2}, "nearly_dead must be between 0 and 1, got 2"),
        ({"warn_above": -0.1}, "warn_above must be between 0 and 1, got -0.1"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeadUnitMonitor(Signs(), **arguments)


def test_numbers_for_a_tracker():
    model = Signs()
    watch = DeadUnitMonitor(model, every=1)
    model(torch.ones(2, 1))
    expected = dict(dead_units=0.5, nearly_dead_units=0.0, always_active_units=0.5, activation_sparsity=0.5)
    assert watch.summary().numbers() == expected
    assert watch.summary().numbers(layers=True) == {**expected, "dead_units/act": 0.5}


def _on_two_processes(rank: int, port: int, shares: list[list[float]]) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(Signs())
    watch = DeadUnitMonitor(model, every=1)
    for x in shares[rank]:
        model(torch.full((2, 1), x)).sum().backward()
    alone, both = watch.summary(), watch.summary(all_processes=True)
    assert alone.layers[0].probability[:2] == [[1.0, 0.0], [0.0, 1.0]][rank]
    assert (both.images, both.steps, both.counted_steps) == (8, 2, 2)
    assert (both.layers[0].probability, both.dead_units, both.sparsity) == ([0.5, 0.5, 0.0, 1.0], 0.25, 0.5)
    uneven = DeadUnitMonitor(model, every=1)
    if rank == 1:
        model.module(torch.ones(2, 1))
    assert uneven.summary(all_processes=True).layers[0].probability == [1.0, 0.0, 0.0, 1.0]
    dist.barrier()  # the first process, which the other reaches the store at, does not leave before it
    del model, watch, uneven
    gc.collect()  # in torch 2.8 a reducer that goes after the group, and with it, waits for ever
    dist.destroy_process_group()


def test_counts_of_processes_are_added_up():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_on_two_processes, (port, [[1.0, 2.0], [-1.0, -2.0]]), nprocs=2)
