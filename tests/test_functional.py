"""SUGAR as a function, against forward gradient injection in float64, and in every mode of PyTorch."""

import io
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vmap
from torch.utils.checkpoint import checkpoint

from timm_sugar import Sugar, forward_gradient_injection, list_surrogates, sugar
from timm_sugar.functional import surrogate_activation
from timm_sugar.kernels import cpu
from timm_sugar.surrogates import get_surrogate

# Of torch itself, which scripts what it differentiates forward: deprecated since 2.10, a FutureWarning since 2.12.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

NAMES = list_surrogates()
SAVES = ["exact", "uint8", "uint4"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Relative to the largest entry: a 16-bit gradient is rounded once, from float32.
TOLERANCES = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6, torch.float64: 1e-12}
CODE_ERRORS = {"exact": 0.0, "uint8": 0.01, "uint4": 0.12}  # the largest of any surrogate's derivative at any x


@pytest.fixture(params=["cpp", "composed"], autouse=True)
def path(request, monkeypatch):
    """Every test runs with kernels and, as where no compiler is installed, without."""
    if request.param == "composed":
        monkeypatch.setattr(cpu, "library", lambda _: None)
    return request.param


def fgi_gradient(x: torch.Tensor, upstream: torch.Tensor, name: str) -> torch.Tensor:
    """The oracle: the gradient of forward gradient injection in float64."""
    x = x.detach().double().requires_grad_()
    y = forward_gradient_injection(x, torch.relu, name)
    return torch.autograd.grad(y, x, upstream.double())[0]


def gradient(x: torch.Tensor, upstream: torch.Tensor, name: str, save: str = "exact") -> torch.Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(sugar(x, name, save=save), x, upstream)[0]


def strided(shape: tuple[int, ...], layout: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if layout == "sliced":
        return torch.randn(*shape[:-1], 2 * shape[-1] + 1, generator=generator).mul(3).to(dtype)[..., 1::2]
    x = torch.randn(shape, generator=generator).mul(3).to(dtype)
    if layout == "expanded":
        return x[..., :1].expand(shape)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


LAYOUTS = ["contiguous", "transposed", "channels_last", "sliced", "expanded"]


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(
    name=st.sampled_from(NAMES),
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    save=st.sampled_from(SAVES),
    seed=st.integers(0, 99),
)
def test_gradient_is_that_of_forward_gradient_injection(name, dtype, shape, layouts, save, seed):
    x = strided(shape, layouts[0], dtype, seed).requires_grad_()
    upstream = strided(shape, layouts[1], dtype, seed + 1)
    y = sugar(x, name, save=save)
    assert torch.equal(y, torch.relu(x))
    assert y.stride() == torch.relu(x).stride()
    (result,) = torch.autograd.grad(y, x, upstream)
    assert result.dtype == dtype
    expected = fgi_gradient(x, upstream, name)
    if x.numel():
        bound = (TOLERANCES[dtype] * 1.4 + CODE_ERRORS[save]) * upstream.double().abs()
        bound += 1e-6 * (dtype != torch.float64)
        assert ((result.double() - expected).abs() <= bound + 1e-12).all()


@pytest.mark.parametrize("save", SAVES)
def test_an_input_without_gradients_saves_nothing(save):
    packed = []
    frozen, weight = torch.randn(3, 4), torch.randn(4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        sugar(frozen, save=save)
        assert packed == []
        sugar(frozen * weight, save=save)
    assert packed


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_infinities_and_nan(name, dtype, save):
    entry = get_surrogate(name)
    large = 0.9 * torch.finfo(dtype).max
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, large, -large] * 5, dtype=dtype)
    y = sugar(x.requires_grad_(), name, save=save)
    torch.testing.assert_close(y, torch.relu(x), equal_nan=True, rtol=0, atol=0)
    result = gradient(x, torch.ones_like(x), name, save)
    expected = entry.derivative(x.detach().double(), entry.alpha).to(dtype)
    tolerance = max(1e-6, TOLERANCES[dtype]) + CODE_ERRORS[save]
    torch.testing.assert_close(result, expected, equal_nan=True, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_second_derivative_is_that_of_the_surrogate(name):
    x = torch.tensor([-3.1, -1.2, -0.3, 0.4, 1.7, 6.0], dtype=torch.float64, requires_grad=True)

    def second(y):
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x, allow_unused=True)[0]

    expected = second(forward_gradient_injection(x, torch.relu, name))
    expected = torch.zeros_like(x) if expected is None else expected
    result = second(sugar(x, name))
    torch.testing.assert_close(torch.zeros_like(x) if result is None else result, expected)


def test_direct_injection_has_no_second_derivative_but_sugar_has():
    x = torch.tensor([-1.0, 0.5], requires_grad=True)
    bsilu = get_surrogate("bsilu")
    m = x * bsilu.derivative(x, bsilu.alpha).detach()
    (first,) = torch.autograd.grad((m - m.detach() + torch.relu(x).detach()).sum(), x, create_graph=True)
    assert not first.requires_grad
    (first,) = torch.autograd.grad(sugar(x).sum(), x, create_graph=True)
    assert first.requires_grad
    assert torch.autograd.gradgradcheck(sugar, x.detach().double().requires_grad_())


@pytest.mark.parametrize("save", ["uint8", "uint4"])
def test_differentiating_twice_through_a_lean_tensor_is_refused(save):
    x = torch.randn(7, requires_grad=True)
    (first,) = torch.autograd.grad(sugar(x, save=save).sum(), x, create_graph=True)
    torch.testing.assert_close(first.detach(), gradient(x, torch.ones(7), "bsilu", save))
    with pytest.raises(RuntimeError, match=f"save='{save}' keeps no pre-activation.*use save='exact'"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="use save='exact'"):
        torch.autograd.grad(torch.autograd.grad(sugar(x, save=save).sum(), x, create_graph=True)[0].sum(), x)


# Forward-mode differentiation in torch itself scripts its decompositions.
_SCRIPTED_IN_TORCH = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")


@_SCRIPTED_IN_TORCH
@pytest.mark.parametrize("save", SAVES)
def test_func_transforms(save):
    x = torch.randn(5, 3, dtype=torch.float64)
    f = partial(sugar, save=save)
    bsilu = get_surrogate("bsilu")
    first = bsilu.derivative(x, bsilu.alpha)
    torch.testing.assert_close(grad(lambda x: f(x).sum())(x), first)
    torch.testing.assert_close(vmap(grad(lambda x: f(x).sum()))(x), first)
    torch.testing.assert_close(vmap(f, in_dims=1, out_dims=1)(x), torch.relu(x))
    value, tangent = jvp(f, (x,), (torch.ones_like(x),))
    torch.testing.assert_close((value, tangent), (torch.relu(x), first))
    torch.testing.assert_close(jacfwd(f)(x[0]), torch.diag(first[0]))
    expected = torch.diag(grad(lambda x: bsilu.derivative(x, bsilu.alpha).sum())(x[0]))
    torch.testing.assert_close(hessian(lambda x: f(x).sum())(x[0]), expected)


@_SCRIPTED_IN_TORCH
def test_forward_mode_with_dual_numbers():
    x, tangent = torch.randn(2, 5, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        y = sugar(torch.autograd.forward_ad.make_dual(x, tangent))
        result = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(result, gradient(x, tangent, "bsilu"))


@pytest.mark.parametrize("save", SAVES)
def test_batched_gradients(save):
    x = torch.randn(6, requires_grad=True)
    upstream = torch.randn(4, 6)
    (batched,) = torch.autograd.grad(sugar(x, save=save), x, upstream, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack([gradient(x, row, "bsilu", save) for row in upstream]))


def saved_storages(f) -> list[torch.UntypedStorage]:
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f()
    assert y.requires_grad
    return list(saved.values())


@pytest.mark.parametrize(("save", "size"), [("exact", 4 * 1001), ("uint8", 1001), ("uint4", 501)])
def test_one_tensor_is_saved(save, size):
    x = torch.randn(7, 11, 13, requires_grad=True)
    storages = saved_storages(lambda: sugar(x, save=save))
    assert [s.nbytes() for s in storages if s.nbytes()] == [size]


@pytest.mark.parametrize("save", SAVES)
def test_a_slice_is_not_copied_to_be_saved(save):
    base = torch.randn(8, 10, requires_grad=True)
    storage = saved_storages(lambda: sugar(base[:, ::2], save=save))[0]
    assert (storage.data_ptr() == base.untyped_storage().data_ptr()) == (save == "exact")


@pytest.mark.parametrize("save", SAVES)
def test_gradient_keeps_channels_last(save):
    x = torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last).requires_grad_()
    y = sugar(x, save=save)
    (result,) = torch.autograd.grad(y, x, torch.randn_like(x))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(save, use_reentrant):
    x, upstream = torch.randn(9, requires_grad=True), torch.randn(9)
    y = checkpoint(partial(sugar, save=save), x, use_reentrant=use_reentrant)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, upstream)[0] if not use_reentrant else _backward(y, x, upstream),
        gradient(x, upstream, "bsilu", save),
    )


def _backward(y, x, upstream):
    y.backward(upstream)
    return x.grad


@pytest.mark.parametrize("save", SAVES)
def test_autocast_leaves_the_dtype_of_the_layer_before(save):
    layer = torch.nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = sugar(layer(torch.randn(3, 4)), save=save)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("save", SAVES)
def test_without_gradients_it_is_relu(save):
    x = torch.randn(5, requires_grad=True)
    with torch.inference_mode():
        assert torch.equal(sugar(x, save=save), torch.relu(x))
    with torch.no_grad():
        assert sugar(x, save=save).grad_fn is None


@pytest.mark.parametrize("save", SAVES)
def test_a_frozen_input_saves_nothing(save):
    assert not sugar(torch.randn(5), save=save).requires_grad


class Net(torch.nn.Module):
    def __init__(self, save: str = "exact"):
        super().__init__()
        self.conv, self.act = torch.nn.Conv2d(3, 4, 3), Sugar(save=save)

    def forward(self, x):
        return self.act(self.conv(x))


@pytest.mark.parametrize("save", SAVES)
def test_export_gives_relu(save):
    program = torch.export.export(Net(save).eval(), (torch.randn(2, 3, 8, 8),))
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert targets == {"aten.conv2d.default", "aten.relu.default"}


@pytest.mark.filterwarnings("ignore:.*torch.jit.:FutureWarning", "ignore:.*torch.jit.:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.jit.script compiles SUGAR activations as ReLU")
@pytest.mark.parametrize("save", SAVES)
def test_trace_script_and_fx(save):
    net, x = Net(save), torch.randn(2, 3, 8, 8)
    traced, scripted = torch.jit.trace(net, x), torch.jit.script(net)
    symbolic = torch.fx.symbolic_trace(net)
    for module in (traced, scripted, symbolic):
        torch.testing.assert_close(module(x), net(x))
    torch.testing.assert_close(
        torch.autograd.grad(symbolic(x).sum(), symbolic.conv.weight)[0],
        torch.autograd.grad(net(x).sum(), net.conv.weight)[0],
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_onnx_gives_relu_nodes():
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    buffer = io.BytesIO()
    torch.onnx.export(Net().eval(), (torch.randn(2, 3, 8, 8),), buffer, dynamo=False)
    assert [n.op_type for n in onnx.load_from_string(buffer.getvalue()).graph.node] == ["Conv", "Relu"]
    program = torch.onnx.export(Net().eval(), (torch.randn(2, 3, 8, 8),), dynamo=True, verbose=False)
    assert [n.op_type for n in program.model.graph] == ["Conv", "Relu"]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["cpp"], indirect=True)  # a compiled graph does not use the kernels
def test_compile_without_a_break_or_a_recompilation(path):
    torch._dynamo.reset()
    layers = [(torch.nn.Conv2d(3 if save == SAVES[0] else 4, 4, 3), Sugar(save=save)) for save in SAVES]
    net = torch.nn.Sequential(*itertools.chain(*layers))
    compiled_net = torch.compile(net, fullgraph=True, dynamic=True)
    for batch in (4, 2, 5, 8):
        x = torch.randn(batch, 3, 8, 8)
        expected = torch.autograd.grad(net(x).sum(), net[0].weight)[0]
        with torch.compiler.set_stance("default" if batch == 4 else "fail_on_recompile"):
            result = torch.autograd.grad(compiled_net(x).sum(), net[0].weight)[0]
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-3)


def test_the_function_itself_in_both_passes():
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    for name in NAMES:
        entry = get_surrogate(name)
        y = surrogate_activation(x, name)
        torch.testing.assert_close(y, entry.function(x, entry.alpha))
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], entry.derivative(x.detach(), entry.alpha))


def test_proxygrad_is_an_injection():
    x = torch.tensor([-2.0, 3.0], requires_grad=True)
    y = forward_gradient_injection(x, torch.relu, F.leaky_relu)
    assert y.tolist() == [0.0, 3.0]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == pytest.approx([0.01, 1.0])


def test_parameters_through_functional_call():
    net = Net()
    parameters = {k: v.detach() for k, v in net.named_parameters()}
    x = torch.randn(2, 3, 8, 8)
    result = grad(lambda p: functional_call(net, p, x).sum())(parameters)
    torch.testing.assert_close(result["conv.bias"], torch.autograd.grad(net(x).sum(), net.conv.bias)[0])


@pytest.mark.parametrize("x", [torch.arange(3), torch.tensor([True]), torch.ones(2, dtype=torch.complex64), [1.0]])
def test_only_real_floating_point_tensors(x):
    with pytest.raises(TypeError, match="expected a"):
        sugar(x)


def test_bad_arguments():
    x = torch.randn(3)
    with pytest.raises(ValueError, match="unknown save mode 'uint'; did you mean 'uint"):
        sugar(x, save="uint")
    with pytest.raises(ValueError, match="'gelu' has no alpha"):
        sugar(x, "gelu", alpha=1.0)
    with pytest.raises(ValueError, match="did you mean 'mish'"):
        sugar(x, "mush")
