"""SUGAR as modules: arguments, copies, registration with timm, and training on several processes."""

import copy
import os
import pickle
import socket

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.layers import create_act_layer, get_act_fn, get_act_layer
from torch import nn

from timm_sugar import Sugar, list_surrogates, register_surrogate, sugar, surrogates
from timm_sugar.layers import Activation, BSiLU, NeLU

SAVES = ["exact", "uint8", "uint4"]


@pytest.mark.parametrize("name", [*list_surrogates(), "swish"])
def test_registered_with_timm(name):
    layer = create_act_layer(f"sugar_{name}", inplace=True)
    assert isinstance(layer, Sugar)
    assert layer.inplace
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    assert torch.equal(get_act_fn(f"sugar_{name}")(x), torch.relu(x))
    assert torch.equal(get_act_layer(f"sugar_{name}")()(x), torch.relu(x))


def test_repr_and_arguments():
    assert repr(Sugar()) == "Sugar(bsilu, alpha=1.67)"
    assert repr(Sugar("swish", inplace=True, save="uint4")) == "Sugar(silu, inplace=True, save=uint4)"
    assert repr(NeLU(alpha=0.5)) == "NeLU(alpha=0.5)"
    assert not Sugar().state_dict()
    with pytest.raises(ValueError, match="did you mean 'uint8'"):
        Sugar(save="uint88")
    with pytest.raises(ValueError, match="no alpha"):
        Sugar("gelu", alpha=1.0)


@pytest.mark.parametrize("save", SAVES)
def test_copies_keep_everything(save):
    layer = Sugar("nelu", 0.3, True, save)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer)


def test_inplace_only_without_gradients():
    x = torch.tensor([-1.0, 2.0])
    with torch.no_grad():
        assert Sugar(inplace=True)(x) is x
    assert x.tolist() == [0.0, 2.0]
    x = torch.tensor([-1.0, 2.0], requires_grad=True) * 1
    Sugar(inplace=True)(x)
    assert x.tolist() == [-1.0, 2.0]


def test_alpha_may_change_during_training():
    layer, x = Sugar(), torch.tensor([0.5], requires_grad=True)
    results = []
    for layer.alpha in (1.67, 0.0):
        (result,) = torch.autograd.grad(layer(x), x)
        results.append(result)
    torch.testing.assert_close(results[1], torch.autograd.grad(nn.functional.silu(x), x)[0])
    assert results[0] > results[1]


@pytest.mark.parametrize(("layer", "surrogate"), [(BSiLU(), "bsilu"), (NeLU(), "nelu")])
def test_surrogates_as_activations(layer, surrogate):
    entry = surrogates.get_surrogate(surrogate)
    x = torch.randn(20, requires_grad=True)
    torch.testing.assert_close(layer(x), entry.function(x, entry.alpha))
    torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), x)[0], entry.derivative(x.detach(), entry.alpha))


def test_a_surrogate_of_ones_own(monkeypatch):
    monkeypatch.setattr(surrogates, "_SURROGATES", dict(surrogates._SURROGATES))
    register_surrogate("triangle", lambda x, alpha: torch.relu(1 - x.abs() / alpha), alpha=2.0)
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0], requires_grad=True)
    create_act_layer("sugar_triangle")(x).sum().backward()
    assert x.grad.tolist() == [0.0, 0.5, 1.0, 0.5]


def test_act_layer_arguments():
    nelu = Activation("nelu")
    layer = Activation(alpha=0.2, save="uint8").resolve(nelu).layer()(inplace=True)
    assert repr(layer) == "Sugar(nelu, alpha=0.2, inplace=True, save=uint8)"
    assert Activation(act_layer="gelu").resolve(nelu).layer() is get_act_layer("gelu")
    assert Activation(alpha=0.05, act_layer="nelu").resolve(nelu).layer()(inplace=True).alpha == 0.05
    assert Activation("bsilu").resolve(Activation("nelu", 0.1)) == Activation("bsilu", 1.67, "exact")
    assert Activation().resolve(Activation("nelu", 0.1)) == Activation("nelu", 0.1, "exact")
    assert Activation().resolve().layer() is None
    with pytest.raises(ValueError, match="alpha needs a surrogate: this model has none of its own"):
        Activation(alpha=0.05).resolve()
    with pytest.raises(ValueError, match="alpha and act_layer contradict"):
        Activation(alpha=0.05, act_layer="gelu").resolve(nelu)
    with pytest.raises(ValueError, match="save and act_layer contradict"):
        Activation(act_layer="gelu", save="uint8").resolve(nelu)
    with pytest.raises(ValueError, match="did you mean 'gelu'"):
        Activation(act_layer="gelux").resolve(nelu)


@pytest.mark.parametrize(("save", "bound"), [("exact", 1.42), ("uint8", 1.12), ("uint4", 1.06)])
def test_saved_activations_of_a_resnet18(save, bound):
    def saved_bytes(act_layer):
        model = timm.create_model("resnet18", num_classes=10, act_layer=act_layer)
        own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage()) and t, lambda t: t
        ):
            y = model(torch.randn(16, 3, 32, 32))
        assert y.requires_grad
        return sum(storage.nbytes() for address, storage in saved.items() if address not in own)

    assert saved_bytes(Activation("bsilu", save=save).resolve().layer()) <= bound * saved_bytes(nn.ReLU)


class Net(nn.Sequential):
    def __init__(self, save: str):
        super().__init__(nn.Linear(6, 8), Sugar(save=save), nn.Linear(8, 3))


WRAPPED = [("ddp", "exact"), ("ddp", "uint4"), ("fsdp2", "exact")]


def _train_on_two_processes(rank: int, port: int, expected: dict[str, list[torch.Tensor]]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    for wrapper, save in WRAPPED:
        torch.manual_seed(0)
        net = Net(save)
        if wrapper == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(net)
        else:
            wrapped = fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
        wrapped(x[2 * rank : 2 * rank + 2]).square().mean().backward()
        for parameter, gradient in zip(net.parameters(), expected[save], strict=True):
            result = parameter.grad.full_tensor() if wrapper == "fsdp2" else parameter.grad
            if wrapper == "fsdp2" and torch.__version__ < "2.9":  # there it sums over gloo, with any activation
                result = result / 2
            torch.testing.assert_close(result, gradient, msg=lambda text, case=(wrapper, save): f"{case}: {text}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one():
    expected = {}
    for _, save in WRAPPED:
        torch.manual_seed(0)
        net = Net(save)
        net(torch.randn(4, 6, generator=torch.Generator().manual_seed(1))).square().mean().backward()
        expected[save] = [p.grad for p in net.parameters()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_train_on_two_processes, (port, expected), nprocs=2)


def test_the_functional_form_takes_the_module_arguments():
    x = torch.randn(5, requires_grad=True)
    a = torch.autograd.grad(sugar(x, "nelu", 0.3).sum(), x)[0]
    b = torch.autograd.grad(Sugar("nelu", 0.3)(x).sum(), x)[0]
    assert torch.equal(a, b)
