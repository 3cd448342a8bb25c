"""Device utilisation: images in device memory, asynchronous copies, fused optimizer steps."""

from typing import Any

import torch
from torch import Tensor

from .images import Images

_LINE = 16  # elements: torch's fused CPU kernels handle a remainder after division by this with different code


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`; copies to a GPU are asynchronous."""
    if device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def place_images(images: Images, device: torch.device) -> None:
    """Move decoded images to a GPU, training images first, as long as they fit into half of its free memory."""
    if device.type != "cuda":
        return
    room = torch.cuda.mem_get_info(device)[0] // 2
    for split in (images.train, images.val, images.test):
        if split is None or split.pixels is None or split.pixels.nbytes > room:
            continue
        room -= split.pixels.nbytes
        split.pixels, split.labels = split.pixels.to(device), split.labels.to(device)


class HostCopy:
    """The value of a tensor on the host, as of the last completed copy; reading does not synchronise with the device.

    On the CPU, copies complete at once. All tensors must have the shape, dtype and device of the first one.
    """

    def __init__(self, tensor: Tensor):
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor)
        self._array = self._copy.numpy()

    def update(self, tensor: Tensor) -> None:
        """Start an asynchronous copy."""
        self._copy.copy_(tensor, non_blocking=True)

    def read(self) -> Any:
        """Return the value as a number or nested lists of numbers."""
        return self._array.tolist()


def use_fused_steps(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Enable the fused implementation of torch's optimizers if torch supports it on the device.

    On the CPU, only SGD is fused, and only for tensors whose size is a multiple of the kernel's block: for these the
    result is bit-identical to that of the unfused step.
    """
    if "fused" not in optimizer.defaults or not type(optimizer).__module__.startswith("torch.optim."):
        return
    if isinstance(optimizer, torch.optim.SGD):
        optimizer.register_step_pre_hook(_divide)
        optimizer.register_step_post_hook(_unite)
    elif device.type == "cuda":
        for group in optimizer.param_groups:
            group["fused"] = True


def _divide(optimizer: Any, *_: Any) -> None:
    """Split each parameter group, for one step, into a fused and an unfused group."""
    optimizer._whole_groups = optimizer.param_groups
    optimizer.param_groups = [
        {**group, "fused": fused, "params": [p for p in group["params"] if _can_be_fused(optimizer, p) == fused]}
        for group in optimizer.param_groups
        for fused in (True, False)
    ]


def _unite(optimizer: Any, *_: Any) -> None:
    optimizer.param_groups = optimizer._whole_groups


def _can_be_fused(optimizer: Any, p: Tensor) -> bool:
    """Whether SGD's fused kernel gives the result of the unfused step: it ignores strides."""
    momentum = optimizer.state.get(p, {}).get("momentum_buffer")
    others = [p.grad, momentum] if optimizer.defaults["momentum"] else [p.grad]
    laid_out = all(other is not None and other.stride() == p.stride() for other in others)
    return laid_out and (p.is_cuda or (p.device.type == "cpu" and p.numel() % _LINE == 0))
