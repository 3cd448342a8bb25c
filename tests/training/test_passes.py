"""No step waits for the device, and a step whose passes are a CUDA graph trains what it trains without."""

import dataclasses
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_sugar.training import TrainConfig
from timm_sugar.training.checkpoint import State
from timm_sugar.training.passes import Passes, graph_of
from timm_sugar.training.processes import StopSignal
from timm_sugar.training.progress import Progress
from timm_sugar.training.tracking import Tracking
from timm_sugar.training.train import build, train_epoch

SMALL = dict(
    data="digits", model="resnet18_cifar_sugar_bsilu", img_size=16, epochs=3, batch_size=16, limit_train=64, lr=0.05,
    model_args={"channels": [8, 8, 8, 8]}, val_fraction=0.0,
)  # fmt: skip
EVERYTHING = dict(
    clip_grad=1.0, ema_decay=0.9, weight_decay=0.1, weight_decay_end=0.01, sched="cosine", warmup_epochs=1,
    mixed_precision="bf16", channels_last=True, smoothing=0.1, hflip=0.5, crop="padded",
)  # fmt: skip
WAYS = {
    "plain": {},
    "everything": EVERYTHING,
    "accumulated": dict(batch_size=8, grad_accum=2, limit_train=64),
    "mixed": dict(mixup=0.8, cutmix=1.0, model_args={"channels": [8, 8, 8, 8], "drop_path_rate": 0.5}),
}


def run_of(tmp_path, **more):
    return build(TrainConfig(**{**SMALL, "output": str(tmp_path), **more}))


def one_epoch(run, epoch, progress):
    return train_epoch(run, State(epoch=epoch), None, progress, Tracking(run.accelerator, "none", {}), StopSignal())


class Guarded(Progress):
    """Progress that has a guard on from the end of the first step to that of the last one of the epoch."""

    def __init__(self, guard, steps):
        super().__init__(steps, 0, 16, enabled=True)
        self._guard, self._last, self.done = guard, steps, 0

    def step(self, *arguments, **options):
        super().step(*arguments, **options)
        self._shown, self.done = 0.0, self.done + 1  # shows every step
        if self.done == 1:
            self._guard.__enter__()
        if self.done == self._last:
            self._guard.__exit__(None, None, None)


class NoWaiting(TorchDispatchMode):
    """Raises where a tensor's value is read, as .item(), float() and bool() do, or a tensor is made from Python."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default):
            raise AssertionError(f"a step calls {func}")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "read", [lambda: torch.ones(()).item(), lambda: bool(torch.ones(())), lambda: torch.tensor(1.0)]
)
def test_the_guard_sees_what_it_should(read):
    with pytest.raises(AssertionError, match="a step calls aten"), NoWaiting():
        read()


@pytest.mark.parametrize("way", WAYS)
def test_no_step_reads_a_tensor_or_makes_one_from_python(way, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run = run_of(tmp_path, **WAYS[way])
    with Guarded(NoWaiting(), run.steps_per_epoch) as progress:
        one_epoch(run, 0, progress)
    assert progress.done == run.steps_per_epoch == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize("way", WAYS)
def test_no_step_waits_for_the_gpu(way, opt, compile, tmp_path, monkeypatch):
    class Debugged:
        def __enter__(self):
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run = run_of(tmp_path, **WAYS[way], opt=opt, compile=compile)
    assert run.images.train.pixels.is_cuda
    assert run.passes.graph == compile
    with Guarded(Debugged(), run.steps_per_epoch) as progress:
        one_epoch(run, 0, progress)
    assert run.passes.graph == compile  # it was captured


@pytest.mark.parametrize(
    ("compile", "graph", "says"),
    [(False, False, "training"), (True, False, "compiling"), (True, True, "compiling and capturing a CUDA graph")],
)
def test_the_bar_says_what_the_first_step_does(compile, graph, says, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    passes = Passes(TrainConfig(compile=compile), torch.nn.Identity(), torch.nn.Identity(), None, graph)
    with Progress(2, 0, 16, enabled=True, warm_up=passes.warm_up) as progress:
        (task,) = progress._bar.tasks
        assert task.description == says
        progress.step(torch.tensor(1.0), torch.eye(2), torch.tensor([0, 0]))
        assert (task.description, task.fields["loss"], task.fields["accuracy"]) == ("training", "1.000", "50%")


class RecordedGraph(TorchDispatchMode):
    """A CUDA graph on the CPU: its operations are recorded, and replayed with the same numbers in the same memory."""

    def __init__(self):
        super().__init__()
        self.calls, self.written = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written += [(tensor, tensor.clone()) for tensor in tensors(value)]
        found = func(*args, **kwargs or {})
        self.calls.append((func, args, kwargs or {}, found))
        return found

    def new_memory(self, call):
        _, args, kwargs, found = call
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
        return [tensor.untyped_storage().data_ptr() not in given for tensor in tensors(found)]

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():  # autograd's operations are recorded, too
            for call in self.calls:
                func, args, kwargs, found = call
                again = tensors(func(*args, **kwargs))
                for old, new, fresh in zip(tensors(found), again, self.new_memory(call), strict=True):
                    if fresh:
                        old.copy_(new)


def tensors(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


@contextmanager
def recording(graph, **_):
    """Record into a graph. A capture computes nothing: what was written is put back, and what was made is NaN."""
    with graph:
        yield
    for call in graph.calls:
        for tensor, fresh in zip(tensors(call[3]), graph.new_memory(call), strict=True):
            if fresh and tensor.is_floating_point():
                tensor.fill_(torch.nan)
    for tensor, before in reversed(graph.written):
        tensor.copy_(before)


class Composed(TorchDispatchMode):
    """Has SUGAR computed by plain operations, as it is while it is recorded."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", recording)


def trained(run, epochs=2):
    lines = []
    with Composed(), Progress(1, 0, 16, enabled=False) as progress:
        for epoch in range(epochs):
            lines.append(one_epoch(run, epoch, progress))
    weights = {**run.network.state_dict(), **(run.ema.state_dict() if run.ema else {})}
    return [(line["train_loss"], line["lr"], line["alpha"]) for line in lines], weights


def with_graph(run):
    return dataclasses.replace(run, passes=Passes(run.config, run.network, run.model, run.accelerator, graph=True))


@pytest.mark.parametrize("way", WAYS)
def test_a_graph_trains_the_same_to_the_bit(way, tmp_path, recorded, monkeypatch):
    alphas = dict(alpha_schedule="linear", alpha_end=0.5)  # a graph has alpha as a constant
    lines, weights = trained(run_of(tmp_path, **WAYS[way], **alphas))
    run, passes = with_graph(run_of(tmp_path, **WAYS[way], **alphas)), []
    monkeypatch.setattr(Passes, "_run", lambda self, *batch, run=Passes._run: [passes.append(1), run(self, *batch)][1])
    found, others = trained(run)
    assert run.passes.graph
    assert len(passes) == 2 * (3 + 1)  # warm-up and capture, in each epoch, and no other
    assert found == lines
    assert lines[0][2] != lines[1][2]
    assert weights.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("way", ["plain", "accumulated"])
def test_what_cannot_be_captured_is_trained_without_a_graph(way, tmp_path, recorded):
    lines, weights = trained(run_of(tmp_path, **WAYS[way]))
    run = with_graph(run_of(tmp_path, **WAYS[way]))
    run.network.register_forward_hook(lambda module, args, output: output.sum().item() and None)
    with pytest.warns(UserWarning, match="^trained without a CUDA graph: operation not permitted when stream is .*$"):
        found, others = trained(run)
    assert not run.passes.graph
    assert found == lines
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("settings", "accelerator", "why"),
    [
        ({}, dict(num_processes=2), "of several processes"),
        ({}, dict(scaler=object()), "the gradient scaler of fp16 waits for the GPU"),
        ({}, {}, None),
        (dict(compile=False), {}, None),
        ({}, dict(device=torch.device("cpu")), None),
    ],
)
def test_a_step_without_a_graph_says_why(settings, accelerator, why, recwarn):
    usual = dict(device=torch.device("cuda"), num_processes=1, scaler=None, is_main_process=True)
    found = graph_of(TrainConfig(**{"compile": True} | settings), SimpleNamespace(**usual | accelerator))
    assert [str(w.message) for w in recwarn] == ([f"compiled without a CUDA graph: {why}"] if why else [])
    assert found == (not settings and not accelerator)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("way", WAYS)
def test_a_graph_on_a_gpu_trains_the_same(way, tmp_path):
    found = []
    for graph in (False, True):
        run = run_of(tmp_path, **WAYS[way])
        run = with_graph(run) if graph else run
        with Progress(1, 0, 16, enabled=False) as progress:
            found.append([one_epoch(run, epoch, progress)["train_loss"] for epoch in (0, 1)])
        assert run.passes.graph == graph
    assert found[0] == pytest.approx(found[1], rel=1e-3)
