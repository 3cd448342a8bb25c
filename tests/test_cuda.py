"""SUGAR on a GPU: kernels in every dtype, layout and save mode, in CUDA graphs, beyond 2^31 elements."""

import pytest
import torch

from timm_sugar import Sugar, list_surrogates, sugar
from timm_sugar.kernels import cpu, cuda
from timm_sugar.surrogates import get_surrogate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

SAVES = ["exact", "uint8", "uint4"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EPSILONS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6, torch.float64: 1e-12}
CODE_ERRORS = {"exact": 0.0, "uint8": 0.01, "uint4": 0.12}


def laid_out(layout: str, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(3, 5, 7, 9, device="cuda", dtype=torch.float64).mul(3).to(dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return x[..., ::2]
    return x[:, :1].expand_as(x) if layout == "expanded" else x


@pytest.fixture(autouse=True)
def _no_composed_path(monkeypatch):
    def fail(name, error):
        raise AssertionError(f"{name}: {error}")

    monkeypatch.setattr(cpu, "tell_why_not", fail)
    monkeypatch.setattr(cuda, "tell_why_not", fail)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list_surrogates())
def test_kernels(name, dtype, save):
    entry = get_surrogate(name)
    for layout in ("contiguous", "channels_last", "sliced", "expanded"):
        for upstream_layout in ("contiguous", "channels_last", "expanded"):
            x = laid_out(layout, dtype).requires_grad_()
            upstream = laid_out(upstream_layout, dtype)[..., : x.shape[-1]]
            y = sugar(x, name, save=save)
            assert torch.equal(y, torch.relu(x))
            (result,) = torch.autograd.grad(y, x, upstream)
            wanted = upstream.double() * entry.derivative(x.detach().double(), entry.alpha)
            bound = (1.5 * EPSILONS[dtype] + CODE_ERRORS[save]) * upstream.double().abs() + 1e-7 * (
                dtype != torch.float64
            )
            assert ((result.double() - wanted).abs() <= bound + 1e-12).all(), (layout, upstream_layout)
    assert cuda.exact(entry, dtype) is not None
    assert cuda.lean() is not None


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("name", list_surrogates())
def test_infinities_and_nan(name, save):
    entry = get_surrogate(name)
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3e38, -3e38], device="cuda", requires_grad=True)
    y = sugar(x, name, save=save)
    torch.testing.assert_close(y, torch.relu(x), equal_nan=True, rtol=0, atol=0)
    (result,) = torch.autograd.grad(y.sum(), x)
    wanted = entry.derivative(x.detach().double(), entry.alpha).float()
    torch.testing.assert_close(result, wanted, equal_nan=True, rtol=0, atol=1e-6 + CODE_ERRORS[save])


@pytest.mark.parametrize("save", SAVES)
def test_captured_in_a_graph_and_on_a_side_stream(save):
    act, x = Sugar(save=save), torch.randn(1000, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(act(x).sum(), x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (result,) = torch.autograd.grad(act(x).sum(), x)
    with torch.no_grad():
        x.copy_(torch.linspace(-4, 4, 1000))
    graph.replay()
    entry = get_surrogate("bsilu")
    torch.testing.assert_close(result, entry.derivative(x.detach(), 1.67), rtol=0, atol=1e-5 + CODE_ERRORS[save])


@pytest.mark.parametrize("save", SAVES)
def test_more_elements_than_32_bits_count(save):
    count = 2**31 + 8
    x = torch.zeros(count, device="cuda", dtype=torch.bfloat16)
    x[-4:] = torch.tensor([-1.0, 0.5, 2.0, -3.0])
    x.requires_grad_()
    y = sugar(x, save=save)
    assert y[-4:].tolist() == [0.0, 0.5, 2.0, 0.0]
    (result,) = torch.autograd.grad(y, x, torch.ones((), device="cuda", dtype=torch.bfloat16).expand(count))
    wanted = get_surrogate("bsilu").derivative(x[-4:].detach().float(), 1.67).bfloat16()
    torch.testing.assert_close(result[-4:], wanted, rtol=0.01, atol=0.01 + CODE_ERRORS[save])


def test_no_step_waits_for_the_gpu():
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), Sugar(), torch.nn.Linear(8, 8), Sugar(save="uint8")).cuda()
    x = torch.randn(4, 8, device="cuda")
    net(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        net(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
