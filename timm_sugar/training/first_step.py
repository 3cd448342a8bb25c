"""Checks before the first step: whether the model receives the surrogate gradient, and how it is computed."""

import torch
from accelerate import Accelerator
from torch import nn

from ..gradients import check_gradients
from ..kernels import gradient_path
from ..layers import Sugar
from ..settings import TrainConfig
from .batches import training_batches
from .images import Images, epoch_order
from .processes import AllReduceMax


def path_of(config: TrainConfig, network: nn.Module, device: torch.device) -> str | None:
    """Return how SUGAR's gradients are computed: cpp, jiterator, triton, composed or torch.compile; None without SUGAR.

    This compiles the kernels.
    """
    layers = {(m.surrogate, m.save) for m in network.modules() if isinstance(m, Sugar)}
    if not layers:
        return None
    if config.compile:
        return "torch.compile"
    return "+".join(sorted({gradient_path(surrogate, save, device=device) for surrogate, save in layers}))


def check_first_step(
    config: TrainConfig, model: nn.Module, images: Images, accelerator: Accelerator, all_reduce_max: AllReduceMax
) -> None:
    """Raise ValueError in every process if any process does not get the surrogate gradient on its first batch."""
    if not any(isinstance(module, Sugar) for module in model.modules()):
        return
    order = epoch_order(config.seed, 0, len(images.train))[accelerator.process_index :: accelerator.num_processes]
    inputs, _ = next(training_batches(config, images, accelerator.device, 0, [order[: config.batch_size]]))
    model.train()
    problem = ""
    try:
        with accelerator.autocast():
            check_gradients(model, inputs)
    except RuntimeError as error:
        if "passes on" not in str(error):
            raise
        problem = str(error)
    if all_reduce_max(bool(problem))[0]:
        raise ValueError(f"not trained: {problem or 'another process found that a surrogate gradient is lost'}")
