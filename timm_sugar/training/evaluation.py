"""Evaluation of a network on images sharded over the processes."""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..analysis import count_units
from ..data import evaluate_batches
from .images import Images

_BATCH = 256
_GPU_PIXELS = 2**21  # per batch on a GPU, such as 2048 images of 32 x 32, if this exceeds _BATCH images


def evaluate_split(
    network: nn.Module,
    images: Images,
    accelerator: Accelerator,
    workers: int,
    after_batch: Callable[[], None] | None,
    name: str,
) -> dict[str, Any]:
    """Return the metrics (see `timm_sugar.metrics`) of "val" or "test" over all processes, for "test" also by class.

    `after_batch` is called the same number of times in every process, so it may contain collective operations.
    """
    split: Any = getattr(images, name)
    cuda = accelerator.device.type == "cuda"
    size = max(_BATCH, _GPU_PIXELS // images.data_config["input_size"][-1] ** 2) if cuda else _BATCH
    # Every process has the same number of batches; the last may be empty.
    count = math.ceil(math.ceil(images.sizes[name] / accelerator.num_processes) / size)
    indices = torch.arange(len(split), device=split.labels.device)
    order = [indices[i * size : (i + 1) * size] for i in range(count)]
    batches = split.batches(order, workers, pin_memory=cuda)
    mean, std = images.data_config["mean"], images.data_config["std"]
    classes = images.class_names if name == "test" else ()
    with count_units(network) as units:
        result = evaluate_batches(network, batches, mean, std, True, after_batch, len(classes))
    if accelerator.num_processes > 1:
        units.add_up_processes(accelerator.device)
    found: dict[str, Any] = {}
    if classes:
        found["test_confusion"] = result.confusion
        found["test_class_top1"] = dict(zip(classes, result.class_top1, strict=True))
    return found | {
        f"{name}_loss": result.loss,
        f"{name}_top1": result.top1,
        f"{name}_top5": result.top5,
        "dead_units": units.dead_units,
        "dead_elements": units.dead_elements,
        "activation_sparsity": units.sparsity,
    }
