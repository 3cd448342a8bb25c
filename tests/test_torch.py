"""The private parts of torch: listed, in their places, and what is done where they are gone."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import timm_sugar
from timm_sugar import _torch

PACKAGE = Path(timm_sugar.__file__).parent
PRIVATE = re.compile(r"\b(?:torch|Tensor|forward_ad)(?:\.\w+)*\._[A-Za-z]\w*")
ALLOWED = {
    "_torch.py": {
        "torch._C._are_functorch_transforms_active", "torch._C._len_torch_dispatch_stack", "torch._C",
        "torch.cuda.jiterator._create_jit_fn", "forward_ad._current_level",
        "torch._C._current_graph_task_id", "torch._dynamo.config", "torch._dynamo",
    },
    "kernels/expression.py": {"Tensor._make_wrapper_subclass"},  # of torch's guide to extending it
    "analysis/landscape.py": {f"torch._foreach_{name}" for name in ("add_", "div", "mul", "sub")},
    "training/processes.py": {f"torch.ops.mkldnn._is_mkldnn_{name}_supported" for name in ("bf16", "fp16")},
}  # fmt: skip


def test_private_parts_stand_where_they_are_listed():
    for path in PACKAGE.rglob("*.py"):
        found = set(PRIVATE.findall(path.read_text()))
        name = str(path.relative_to(PACKAGE))
        assert found <= ALLOWED.get(name, set()), (name, found - ALLOWED.get(name, set()))


def test_they_are_there():
    assert _torch.dispatch_modes() == 0
    assert not _torch.is_transformed()
    assert callable(torch.cuda.jiterator._create_jit_fn)


@pytest.mark.parametrize("name", ["_are_functorch_transforms_active", "_len_torch_dispatch_stack"])
def test_where_one_is_gone_the_gradient_is_still_right(name, monkeypatch):
    from timm_sugar import functional
    from timm_sugar.kernels import memory

    monkeypatch.delattr(torch._C, name)
    fresh = importlib.reload(_torch)
    try:
        for module in (functional, memory):
            for attribute in ("is_transformed", "dispatch_modes"):
                if hasattr(module, attribute):
                    monkeypatch.setattr(module, attribute, getattr(fresh, attribute))
        x = torch.linspace(-2, 2, 9, dtype=torch.float64).requires_grad_()
        y = timm_sugar.sugar(x)
        (result,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(y, torch.relu(x))
        torch.testing.assert_close(result, timm_sugar.surrogates._bsilu_derivative(x.detach(), 1.67))
    finally:
        monkeypatch.undo()
        importlib.reload(_torch)
