"""--dry-run and --eval-only: estimate the cost of a run, or evaluate its weights, without training."""

import itertools
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..data import evaluate_batches
from .checkpoint import KEPT, State, latest_checkpoint, read_checkpoint
from .evaluation import evaluate_split
from .folder import peak_memory
from .processes import from_main_process
from .train import Run, train_steps

_BATCH = 64


def dry_run(run: Run) -> dict[str, Any]:
    """Time two training steps and one evaluation batch, and return the estimated cost of the run; write nothing.

    `peak_memory_bytes` is the peak so far, and `disk_bytes` an upper bound.
    """
    config = run.config
    steps = itertools.chain(train_steps(run, State()), train_steps(run, State()))  # an epoch may be a single step
    next(steps)[0].item()  # synchronises with the device
    began = time.perf_counter()
    next(steps)[0].item()
    step_seconds = time.perf_counter() - began

    began = time.perf_counter()
    count = min(_BATCH, len(run.images.test))
    mean, std = run.images.data_config["mean"], run.images.data_config["std"]
    evaluate_batches(run.evaluated, run.images.test.batches([list(range(count))]), mean, std, shared=False)
    image_seconds = (time.perf_counter() - began) / count
    share = 1 / run.accelerator.num_processes
    # Training, by the time of the second step, and validation.
    epoch_seconds = run.steps_per_epoch * step_seconds + image_seconds * share * run.images.sizes["val"]

    weights = _bytes(run.evaluated.state_dict().values())
    moments = _bytes(v for state in run.optimizer.state.values() for v in state.values() if torch.is_tensor(v))
    checkpoint = weights * (3 if run.ema is not None else 2) + moments  # current and best weights
    return dict(
        steps_per_epoch=run.steps_per_epoch,
        epochs=config.epochs,
        seconds_per_epoch=round(epoch_seconds, 2),
        seconds=round(config.epochs * epoch_seconds + image_seconds * share * run.images.sizes["test"], 1),
        peak_memory_bytes=peak_memory(run.accelerator.device),
        disk_bytes=checkpoint * (KEPT + 1) + weights,
    )


def evaluate_only(run: Run) -> dict[str, Any]:
    """Evaluate the packaged weights in OUTPUT, else the best weights of the newest checkpoint or of --resume."""
    path, tensors = from_main_process(_best_weights, run)
    try:
        run.evaluated.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit {run.config.model}: {error}") from error
    measured: dict[str, Any] = {"weights": str(path), "model": run.config.model, "data": run.config.data}
    names = ("test",) if run.images.val is None else ("val", "test")
    for name in names:
        result = evaluate_split(run.evaluated, run.images, run.accelerator, run.config.workers, None, name)
        measured |= {k: v for k, v in result.items() if k.startswith(name)}
        measured |= {f"{name}_images": run.images.sizes[name]}
    return measured


def _best_weights(run: Run) -> tuple[Path, dict[str, torch.Tensor]]:
    packaged = run.config.folder / "model" / "model.safetensors"
    if run.config.resume == "auto" and packaged.exists():
        return packaged, load_file(packaged)
    auto = run.config.resume in ("auto", "never")
    path = latest_checkpoint(run.config.folder / "checkpoints") if auto else Path(run.config.resume)
    if path is None:
        raise ValueError(f"{run.config.folder} holds neither a packaged model nor a checkpoint to evaluate")
    checkpoint = read_checkpoint(path)
    return path, checkpoint.best or checkpoint.weights


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
