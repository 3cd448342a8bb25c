"""The surrogate gradient arrives in every way that PyTorch differentiates, on each version of it that is supported.

Each test compares the gradient of a layer before the activation with forward gradient injection in float64, from which
that of plain ReLU is far. `make test-versions` runs this file on the oldest and on other versions of torch, and
TIMM_SUGAR_TEST_DEVICE=cuda on a GPU.
"""

import contextlib
import functools
import logging
import os
import socket
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from timm_sugar import Sugar, list_surrogates, register_surrogate, sugar, surrogates
from timm_sugar.surrogates import get_surrogate

DEVICE = os.environ.get("TIMM_SUGAR_TEST_DEVICE", "cpu")
SAVES = ["exact", "uint8", "uint4"]
TOLERANCES = {"exact": 1e-9, "uint8": 0.03, "uint4": 0.25}  # of the gradient's norm; ReLU's is 0.4 away and more
BACKENDS = ["eager", "aot_eager", "inductor"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


class Injected(nn.Module):
    """The oracle: the paper's direct form (eq. 5 and 6), whose derivative autograd finds by itself."""

    def __init__(self, name: str, alpha: float | None = None):
        super().__init__()
        self.entry = get_surrogate(name)
        self.alpha = self.entry.resolve_alpha(alpha)

    def forward(self, x):
        m = x * self.entry.derivative(x, self.alpha).detach()
        return m - m.detach() + torch.relu(x).detach()


def network(act: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 16), act, nn.Linear(16, 3)).double().to(DEVICE)


X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
UPSTREAM = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(DEVICE)


def backward(model, net=None, x=X):
    """The gradient of the first layer of a network, through `model`, which holds its weights or wraps it."""
    net = model if net is None else net
    net.zero_grad()
    (model(x) * UPSTREAM).sum().backward()
    return first_weight(net).grad.clone()


def first_weight(net):
    return next(p for name, p in net.named_parameters() if name.endswith("0.weight"))


@functools.cache
def expected(name: str, alpha: float | None = None) -> torch.Tensor:
    entry = get_surrogate(name)
    result = backward(network(Injected(name, alpha)))
    plain = backward(network(nn.ReLU()))
    if entry.name not in ("nelu", "leaky_relu"):  # closest to ReLU
        assert (result - plain).norm() > 0.3 * result.norm()
    return result


def check(result: torch.Tensor, name: str = "bsilu", save: str = "exact", alpha: float | None = None) -> None:
    wanted = expected(name, alpha)
    error = ((result - wanted).norm() / wanted.norm()).item()
    assert error <= TOLERANCES[save], f"off by {error:.2g}"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    logging.getLogger("torch").setLevel(logging.ERROR)


@pytest.fixture(scope="module", autouse=True)
def _own_surrogate():
    """One without a function, as a user may register it; its derivative is not in the table of C++ forms."""
    before = dict(surrogates._SURROGATES)
    register_surrogate("own", lambda x, alpha: alpha * torch.special.i0e(x), alpha=0.8)
    yield
    surrogates._SURROGATES.clear()
    surrogates._SURROGATES.update(before)


NAMES = [*list_surrogates(), "own"]


# Transforms of torch.func, each giving the same gradient as a backward pass.


def parameters(net):
    return {name: p.detach() for name, p in net.named_parameters()}


def loss(net, p, x=X, upstream=UPSTREAM):
    return (functional_call(net, p, (x,)) * upstream).sum()


def by_grad(net):
    return grad(lambda p: loss(net, p))(parameters(net))["0.weight"]


def by_vjp(net):
    return vjp(lambda p: functional_call(net, p, (X,)), parameters(net))[1](UPSTREAM)[0]["0.weight"]


def by_jacrev(net):
    jacobian = jacrev(lambda p: functional_call(net, p, (X,)))(parameters(net))["0.weight"]
    return torch.einsum("bo,boij->ij", UPSTREAM, jacobian)


def by_jacfwd(net):
    jacobian = jacfwd(lambda p: functional_call(net, p, (X,)))(parameters(net))["0.weight"]
    return torch.einsum("bo,boij->ij", UPSTREAM, jacobian)


def by_jvp(net):
    p = parameters(net)

    def directional(tangent):
        tangents = {name: torch.zeros_like(value) for name, value in p.items()} | {"0.weight": tangent}
        return jvp(lambda p: loss(net, p), (p,), (tangents,))[1]

    weight = p["0.weight"]
    directions = torch.eye(weight.numel(), dtype=weight.dtype, device=weight.device).view(-1, *weight.shape)
    return torch.stack([directional(direction) for direction in directions]).view_as(weight)


def by_vmap(net):
    per_sample = vmap(grad(lambda p, x, upstream: loss(net, p, x, upstream)), (None, 0, 0))
    return per_sample(parameters(net), X, UPSTREAM)["0.weight"].sum(0)


TRANSFORMS = dict(grad=by_grad, vjp=by_vjp, jacrev=by_jacrev, jacfwd=by_jacfwd, jvp=by_jvp, vmap=by_vmap)
FORWARD_MODE = ("jacfwd", "jvp")


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("name", NAMES)
def test_eager(name, save):
    check(backward(network(Sugar(name, save=save))), name, save)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("alpha", [0.3, 4.0])
def test_alpha_is_used(alpha, save):
    check(backward(network(Sugar("bsilu", alpha, save=save))), "bsilu", save, alpha)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "save"), [*((n, "exact") for n in NAMES), ("bsilu", "uint8"), ("bsilu", "uint4"), ("elu", "uint8")]
)
def test_compiled(name, save, backend):
    net = network(Sugar(name, save=save))
    check(backward(torch.compile(net, backend=backend, fullgraph=True), net), name, save)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize(
    "how", [dict(dynamic=True), dict(mode="reduce-overhead"), dict(mode="max-autotune-no-cudagraphs")]
)
def test_compiled_in_other_modes(how, save):
    net = network(Sugar(save=save))
    check(backward(torch.compile(net, **how), net), save=save)


@pytest.mark.parametrize("save", SAVES)
def test_compiled_in_place(save):
    net = network(Sugar(save=save))
    net.compile(backend="aot_eager")
    check(backward(net), save=save)


@pytest.mark.parametrize("save", SAVES)
def test_alpha_changed_between_compiled_calls(save):
    act = Sugar(save=save)
    net = network(act)
    model = torch.compile(net, backend="aot_eager", fullgraph=True)
    for alpha in (1.67, 0.2, 3.0, 1.67, 0.5, 2.5):
        act.alpha = alpha
        check(backward(model, net), save=save, alpha=alpha)


def test_another_surrogate_under_the_same_name_between_compiled_calls():
    before = dict(surrogates._SURROGATES)
    net = network(Sugar("own"))
    model = torch.compile(net, backend="aot_eager", fullgraph=True)
    check(backward(model, net), "own")
    try:
        register_surrogate("own", lambda x, alpha: torch.exp(-x * x), alpha=0.8)
        expected.cache_clear()
        check(backward(model, net), "own")
    finally:
        surrogates._SURROGATES.update(before)
        expected.cache_clear()


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transformed(transform, save):
    check(TRANSFORMS[transform](network(Sugar(save=save))))  # exact in every mode


@pytest.mark.parametrize("name", NAMES)
def test_transformed_with_every_surrogate(name):
    check(by_vmap(network(Sugar(name))), name)
    check(by_jvp(network(Sugar(name))), name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transformed_inside_compile(transform, backend):
    net = network(Sugar())
    # Forward-mode differentiation inside compile is right, or refused by torch.
    refused = contextlib.suppress(Exception) if transform in FORWARD_MODE else contextlib.nullcontext()
    result = None
    with refused:
        result = torch.compile(TRANSFORMS[transform], backend=backend)(net)
    if result is not None:
        check(result)


def test_transform_of_a_compiled_network():
    net = network(Sugar())
    model = torch.compile(net, backend="aot_eager")
    p = {f"_orig_mod.{name}": value for name, value in parameters(net).items()}
    check(grad(lambda p: (functional_call(model, p, (X,)) * UPSTREAM).sum())(p)["_orig_mod.0.weight"])


@pytest.mark.parametrize("compiled", [False, True])
def test_hessian_of_a_network(compiled):
    def of(act):
        net = network(act)
        return lambda b: functional_call(net, parameters(net) | {"0.bias": b}, (X,)).square().sum()

    class Function(nn.Module):  # forward gradient injection, indirect, has the second derivative of the surrogate
        def forward(self, x):
            entry = get_surrogate("bsilu")
            s = entry.function(x, entry.alpha)
            return s - s.detach() + torch.relu(x).detach()

    bias = network(Sugar())[0].bias.detach()
    wanted = hessian(of(Function()))(bias)
    transform = hessian(of(Sugar()))
    if compiled:
        try:
            result = torch.compile(transform, backend="aot_eager")(bias)
        except Exception:  # hessian is forward over reverse
            transform = jacrev(jacrev(of(Sugar())))
            result = torch.compile(transform, backend="aot_eager")(bias)
    else:
        result = transform(bias)
    torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("compiled", ["no", "around", "inside"])
def test_checkpointed(compiled, use_reentrant, save):
    net = network(Sugar(save=save))
    middle = net[1:3]
    if compiled == "inside":
        middle = torch.compile(middle, backend="aot_eager")

    def model(x):
        return net[3](checkpoint(middle, net[0](x), use_reentrant=use_reentrant))

    if compiled == "around":
        model = torch.compile(model, backend="inductor")
    check(backward(model, net), save=save)


@pytest.mark.parametrize("save", SAVES)
def test_compiled_autograd(save):
    net = network(Sugar(save=save))
    with torch._dynamo.config.patch(compiled_autograd=True):
        check(backward(torch.compile(net, backend="aot_eager"), net), save=save)


@pytest.mark.parametrize("name", NAMES)
def test_traced(name):
    traced = torch.jit.trace(network(Sugar(name)), X)
    for _ in range(3):  # it is optimised after its first calls
        check(backward(traced), name)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("name", "save"), [*((n, "exact") for n in NAMES), ("bsilu", "uint8"), ("bsilu", "uint4")])
def test_exported_and_then_trained(name, save, strict):
    check(backward(torch.export.export(network(Sugar(name, save=save)), (X,), strict=strict).module()), name)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_exported_for_inference_it_is_one_relu(how, save, strict):
    net = network(Sugar(save=save)).train(how != "eval")
    with torch.set_grad_enabled(how == "eval"):
        program = torch.export.export(net, (X,), strict=strict)
        traced = torch.jit.trace(net, X) if how == "eval" else None
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called == ["aten.linear.default", "aten.linear.default", "aten.relu.default", "aten.linear.default"]
    if traced is not None:
        kinds = [node.kind() for node in traced.inlined_graph.nodes()]
        assert [kind for kind in kinds if kind in ("aten::relu", "aten::detach", "aten::where")] == ["aten::relu"]


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("save", SAVES)
def test_fx(save, enabled):
    net = network(Sugar(save=save, inplace=True))
    with torch.set_grad_enabled(enabled):
        traced = torch.fx.symbolic_trace(net)
    check(backward(traced), save=save)


@pytest.mark.parametrize("enabled", [True, False])
def test_feature_extractor(enabled):
    from torchvision.models.feature_extraction import create_feature_extractor

    net = network(Sugar(inplace=True))
    with torch.set_grad_enabled(enabled):
        extractor = create_feature_extractor(net, {"3": "out"})
    check(backward(lambda x: extractor(x)["out"], extractor))


def test_aot_module_and_make_fx():
    from torch._functorch.aot_autograd import aot_module
    from torch.fx.experimental.proxy_tensor import make_fx

    net = network(Sugar())
    check(backward(aot_module(net, fw_compiler=lambda graph, _: graph, bw_compiler=lambda graph, _: graph), net))

    def gradient(weight, *others):
        weight = weight.detach().requires_grad_()
        p = dict(zip(names, (weight, *others), strict=True))
        return torch.autograd.grad(loss(net, p, X * 1, UPSTREAM * 1), weight)[0]

    names, values = zip(*parameters(net).items(), strict=True)
    graph = make_fx(gradient, tracing_mode="real")(*(torch.zeros_like(value) for value in values))
    check(graph(*values))


def test_other_tensors_than_plain_ones():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        check(backward(network(Sugar())))
    with FakeTensorMode():
        x = torch.randn(4, requires_grad=True)
        for save in SAVES:
            sugar(x * 1, save=save).sum().backward()
        assert x.grad.shape == (4,)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("name", ["bsilu", "nelu"])
def test_nested_tensors(name, save):
    parts = [torch.randn(n, 4, dtype=torch.float64, device=DEVICE) for n in (2, 5, 1)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    y = sugar(x, name, save=save)
    torch.testing.assert_close(y.values(), torch.relu(x.values()))
    (result,) = torch.autograd.grad(y.values().sum(), x)
    entry = get_surrogate(name)
    torch.testing.assert_close(result.values(), entry.derivative(torch.cat(parts), entry.alpha))


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_overwritten_after_the_activation(backend, save):
    """In eager mode autograd raises; compiled, the gradient must be that at the value before, or raise too."""

    def model(x):
        h = net[1](net[0](x))
        y = net[2](h)
        h += 100.0
        return net[3](y)

    net = network(Sugar(save=save))
    run = model if backend is None else torch.compile(model, backend=backend)
    if save == "exact":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            backward(run, net)
    else:
        check(backward(run, net), save=save)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_grad_scaler(dtype, compiled, save):
    net = network(Sugar(save=save)).float()
    model = torch.compile(net, backend="aot_eager") if compiled else net
    scaler = torch.amp.GradScaler(DEVICE, init_scale=64.0)
    with torch.autocast(DEVICE, dtype):
        y = model(X.float())
    assert y.dtype == dtype
    scaler.scale((y.float() * UPSTREAM.float()).sum()).backward()
    error = (net[0].weight.grad.double() / 64 - expected("bsilu")).norm() / expected("bsilu").norm()
    assert error <= 0.02 + TOLERANCES[save]


@pytest.mark.parametrize("save", SAVES)
def test_retained_graph_and_hooks(save):
    net = network(Sugar(save=save))
    seen = []
    net[2].register_full_backward_hook(lambda module, into, out: seen.append(into[0].shape))
    y = (net(X) * UPSTREAM).sum()
    y.backward(retain_graph=True)
    y.backward()
    check(first_weight(net).grad / 2, save=save)
    assert seen == [(5, 16)] * 2


@pytest.mark.parametrize("save", SAVES)
def test_threads(save):
    """As nn.DataParallel differentiates: a thread a replica."""
    results = {}

    networks = [network(Sugar(save=save)) for _ in range(4)]

    def work(number):
        results[number] = backward(networks[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results.values():
        check(result, save=save)


@pytest.mark.parametrize("strict", [True, False])
def test_quantisation_aware_training(strict):
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    quantizer = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    net = network(Sugar()).float()
    program = torch.export.export(net, (X.float(),), strict=strict).module()
    chosen = quantizer.X86InductorQuantizer().set_global(
        quantizer.get_default_x86_inductor_quantization_config(is_qat=True)
    )
    prepared = pt2e.prepare_qat_pt2e(program, chosen)
    weight = first_weight(prepared)
    (prepared(X.float()) * UPSTREAM.float()).sum().backward()
    error = (weight.grad.double() - expected("bsilu")).norm() / expected("bsilu").norm()
    assert error < 0.1  # fake quantisation to 8 bits; ReLU's gradient is 0.3 away and more
    with torch.no_grad():
        before = prepared(X.float())
        quantised = pt2e.convert_pt2e(prepared)(X.float())
    torch.testing.assert_close(quantised, before, rtol=0.1, atol=0.1)


def _on_two_processes(rank: int, port: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for save in SAVES:
        for compiled in (False, True):
            for wrapper in ("ddp", "fsdp2"):
                net = network(Sugar(save=save))
                net.compile(backend="aot_eager") if compiled and wrapper == "fsdp2" else None
                model = nn.parallel.DistributedDataParallel(net) if wrapper == "ddp" else fully_shard(net, mesh=mesh)
                if compiled and wrapper == "ddp":
                    model = torch.compile(model, backend="aot_eager")
                result = backward(model, net)
                result = result.full_tensor() if wrapper == "fsdp2" else result
                try:
                    check(result, save=save)
                except AssertionError as error:
                    raise AssertionError(f"{wrapper}, save {save}, compiled {compiled}: {error}") from None
        x = distribute_tensor(torch.linspace(-3, 3, 8, dtype=torch.float64), mesh, [Shard(0)]).requires_grad_()
        sugar(x, save=save).sum().backward()
        entry = get_surrogate("bsilu")
        wanted = entry.derivative(torch.linspace(-3, 3, 8, dtype=torch.float64), entry.alpha)
        torch.testing.assert_close(x.grad.full_tensor(), wanted)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="two processes on CPUs")
def test_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_on_two_processes, (port,), nprocs=2)


@pytest.mark.filterwarnings("ignore:.*torch.jit.:FutureWarning", "ignore:.*torch.jit.:DeprecationWarning")
def test_scripted_it_is_relu_and_says_so_once():
    from timm_sugar import layers

    layers._warn_of_script.cache_clear()
    net = network(Sugar())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scripted = torch.jit.script(net)
        torch.jit.script(network(Sugar("nelu")))
    said = [str(warning.message) for warning in caught if "SUGAR" in str(warning.message)]
    assert said == ["torch.jit.script compiles SUGAR activations as ReLU, gradient included: train before you script"]
    torch.testing.assert_close(backward(scripted), backward(network(nn.ReLU())))
    check(backward(net))  # the network itself is left as it was


@pytest.mark.parametrize("save", SAVES)
def test_forward_mode_goes_on_where_gradients_are_off(save):
    x, tangent = X[0], UPSTREAM[0].repeat(2)
    wanted = get_surrogate("bsilu").derivative(x, 1.67) * tangent
    with torch.no_grad():
        _, result = jvp(lambda x: sugar(x, save=save), (x,), (tangent,))
    torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_checkpoint_under_a_mode_in_one_pass_only(where):
    from torch.utils.flop_counter import FlopCounterMode

    net = network(nn.Sequential(nn.LayerNorm(16), Sugar(), nn.Sigmoid()))
    reference = network(nn.Sequential(nn.LayerNorm(16), Injected("bsilu"), nn.Sigmoid()))
    wanted = backward(reference)
    net.zero_grad()
    with FlopCounterMode(display=False) if where == "forward" else contextlib.nullcontext():
        y = net[3](checkpoint(net[2], net[1](net[0](X)), use_reentrant=False))
    with FlopCounterMode(display=False) if where == "backward" else contextlib.nullcontext():
        (y * UPSTREAM).sum().backward()
    torch.testing.assert_close(net[0].weight.grad, wanted)


def test_fx_traced_in_eval_and_then_trained():
    traced = torch.fx.symbolic_trace(network(Sugar()).eval()).train()
    check(backward(torch.export.export(traced, (X,)).module()))
    check(backward(torch.jit.trace(traced, X)))
