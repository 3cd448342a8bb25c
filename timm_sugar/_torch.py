"""The private parts of torch that we use, each with its reason and the fallback if a torch version lacks it."""

import sys
from typing import Any

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a `torch.func` transform or a forward-mode level is active; True if unknown.

    There is no public API for this. The path for transforms is also correct without them, but slower.
    """
    return _functorch_active() or getattr(forward_ad, "_current_level", 0) >= 0


def is_recorded() -> bool:
    """Whether `make_fx`, which export and AOTAutograd use, is recording operations; True if unknown."""
    from torch.fx.experimental import proxy_tensor  # experimental, as its name says

    mode = getattr(proxy_tensor, "get_proxy_mode", None)
    return mode is None or mode() is not None


def is_trace_check() -> bool:
    """Whether `torch.jit.trace` is running its check: a second trace, with gradients off, compared with the first.

    Only the call stack shows this. If the check is not recognised, the comparison fails with an error.
    """
    frame = sys._getframe() if torch.jit.is_tracing() else None
    while frame is not None and frame.f_code.co_name != "_check_trace":
        frame = frame.f_back
    return frame is not None


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread, where checkpointing calls modules again.

    There is no public API for this. Fallback: recomputed calls are counted like calls of the forward pass.
    """
    return bool(_graph_task() != -1)


def skip_hook_guards(skip: bool) -> bool:
    """Set whether compiled code ignores hooks that are added or removed after compilation; return the old value.

    torch's notes on modules and hooks name this setting of Dynamo, but it has no public API. Fallback: True, its
    default.
    """
    config = torch._dynamo.config
    was = bool(getattr(config, "skip_nnmodule_hook_guards", True))
    if hasattr(config, "skip_nnmodule_hook_guards"):
        config.skip_nnmodule_hook_guards = skip
    return was


_graph_task: Any = getattr(torch._C, "_current_graph_task_id", lambda: -1)
_functorch_active: Any = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)

# The number of active dispatch modes (tracing, fake tensors, counters). There is no public API for this. Fallback: 1,
# which selects plain operations: always correct, but slower.
dispatch_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def post_accumulate_hooks(parameter: torch.Tensor) -> dict[int, Any]:
    """Return torch's own dict of the hooks of `Tensor.register_post_accumulate_grad_hook`, or an empty one.

    There is no public API for this. Fallback: the hooks run during `check_gradients`.
    """
    return getattr(parameter, "_post_accumulate_grad_hooks", None) or {}


def jiterator(code: str) -> Any:
    """Return an elementwise CUDA or HIP kernel compiled from C++; None if torch has no jiterator.

    ``torch.cuda.jiterator._create_jit_fn``: torch documents the module as a prototype.
    """
    create = getattr(getattr(torch.cuda, "jiterator", None), "_create_jit_fn", None)
    return None if create is None else create(code, alpha=0.0)
