"""What keeps a device busy: images in its memory, copies that nobody waits for, fused steps of the optimizer."""

from typing import Any

import torch
from torch import Tensor

from .images import Images

_LINE = 16  # elements: torch's fused kernels on the CPU divide a tensor by these, and have other code for what is left


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`; a GPU copies it while the host goes on."""
    if device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def place_images(images: Images, device: torch.device) -> None:
    """Move the images that are held in memory to a GPU, train first, as far as half of its free memory takes them."""
    if device.type != "cuda":
        return
    room = torch.cuda.mem_get_info(device)[0] // 2
    for split in (images.train, images.val, images.test):
        if split is None or split.pixels is None or split.pixels.nbytes > room:
            continue
        room -= split.pixels.nbytes
        split.pixels, split.labels = split.pixels.to(device), split.labels.to(device)


class HostCopy:
    """The value of a tensor on the host as of the last copy that has arrived; nothing waits for the device.

    On the CPU that is the last one made. The first tensor has the shape, dtype and device of those to come.
    """

    def __init__(self, tensor: Tensor):
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor)
        self._array = self._copy.numpy()

    def update(self, tensor: Tensor) -> None:
        """Begin to copy."""
        self._copy.copy_(tensor, non_blocking=True)

    def read(self) -> Any:
        """Return the number, or the numbers as nested lists."""
        return self._array.tolist()


def use_fused_steps(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Have torch's optimizers take their step in one pass over the weights, where torch has that for the device.

    On the CPU it is done for SGD alone, and for the tensors that its kernel divides evenly: there it gives the same
    bits as a step without it.
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
    """Divide each group, for one step, into what is stepped by the fused kernel and what is not."""
    optimizer._whole_groups = optimizer.param_groups
    optimizer.param_groups = [
        {**group, "fused": fused, "params": [p for p in group["params"] if _can_be_fused(optimizer, p) == fused]}
        for group in optimizer.param_groups
        for fused in (True, False)
    ]


def _unite(optimizer: Any, *_: Any) -> None:
    optimizer.param_groups = optimizer._whole_groups


def _can_be_fused(optimizer: Any, p: Tensor) -> bool:
    """Whether SGD's fused kernel gives what the step without it gives: it goes through memory from end to end."""
    momentum = optimizer.state.get(p, {}).get("momentum_buffer")
    others = [p.grad, momentum] if optimizer.defaults["momentum"] else [p.grad]
    laid_out = all(other is not None and other.stride() == p.stride() for other in others)
    return laid_out and (p.is_cuda or (p.device.type == "cpu" and p.numel() % _LINE == 0))
