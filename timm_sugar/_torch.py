"""The private parts of torch that are relied on, each with its reason and with what is done where it is gone."""

import sys
from typing import Any

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a `torch.func` transform or a forward-mode level is active; True where it cannot be known.

    There is no public way to ask. The function that is right under transforms is right without them too, but slower.
    """
    return _functorch_active() or getattr(forward_ad, "_current_level", 0) >= 0


def is_recorded() -> bool:
    """Whether `make_fx`, on which export and AOTAutograd build, records operations; True where it cannot be known."""
    from torch.fx.experimental import proxy_tensor  # experimental by its name

    mode = getattr(proxy_tensor, "get_proxy_mode", None)
    return mode is None or mode() is not None


def is_trace_check() -> bool:
    """Whether `torch.jit.trace` is at its second trace, which it makes with gradients off and compares with the first.

    That it is so stands nowhere but on the stack. Where it is not recognised, the comparison fails with an error.
    """
    frame = sys._getframe() if torch.jit.is_tracing() else None
    while frame is not None and frame.f_code.co_name != "_check_trace":
        frame = frame.f_back
    return frame is not None


def in_backward() -> bool:
    """Whether autograd is computing a backward pass in this thread, in which checkpointing calls modules again.

    There is no public way to ask. Where it is gone, such calls are counted as if they were the network's own.
    """
    return bool(_graph_task() != -1)


def skip_hook_guards(skip: bool) -> bool:
    """Set whether compiled code goes on when a module has got or lost a hook since; return what it was.

    A setting of Dynamo that torch's notes on modules and hooks name, without a public place. Where it is gone, it is as
    if it was True, its default.
    """
    config = torch._dynamo.config
    was = bool(getattr(config, "skip_nnmodule_hook_guards", True))
    if hasattr(config, "skip_nnmodule_hook_guards"):
        config.skip_nnmodule_hook_guards = skip
    return was


_graph_task: Any = getattr(torch._C, "_current_graph_task_id", lambda: -1)
_functorch_active: Any = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)

# How many dispatch modes see every operation (tracing, fake tensors, counters). There is no public way to ask. Where it
# is gone there is said to be one: plain operations are right with and without, but slower.
dispatch_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def post_accumulate_hooks(parameter: torch.Tensor) -> dict[int, Any]:
    """Return the hooks of `Tensor.register_post_accumulate_grad_hook`, as the dict that torch reads; or an empty one.

    There is no public way to see them. Where it is gone they run in `check_gradients`.
    """
    return getattr(parameter, "_post_accumulate_grad_hooks", None) or {}


def jiterator(code: str) -> Any:
    """Return an elementwise CUDA or HIP kernel compiled from C++; None where torch has no such compiler.

    ``torch.cuda.jiterator._create_jit_fn``: torch documents the module as a prototype.
    """
    create = getattr(getattr(torch.cuda, "jiterator", None), "_create_jit_fn", None)
    return None if create is None else create(code, alpha=0.0)
