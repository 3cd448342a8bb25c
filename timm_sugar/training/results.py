"""What a run measures and writes: metrics, summary, configuration, the packaged model."""

import dataclasses
import json
import math
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import timm
import torch
import yaml
from torch import Tensor

import timm_sugar

from ..analysis import count_units
from ..data import Split, evaluate_batches
from ..files import to_yaml, write_file
from ..hub import write_model_folder
from ..metrics import METRICS
from ..settings import TrainConfig, names_of
from .build import Run
from .processes import from_main_process, process_state
from .schedules import set_surrogate

_EVAL_BATCH = 256


def finished_summary(config: TrainConfig) -> dict[str, Any] | None:
    """Return the summary of a run that is finished already, None if it is not or is to start afresh.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    state = process_state()
    found: tuple[dict[str, Any] | None, str | None] = None, None
    if state.is_main_process and config.resume != "never":
        try:
            found = read_finished(config, state.num_processes), None
        except ValueError as error:
            found = None, str(error)
    summary: dict[str, Any] | None
    summary, problem = from_main_process(found)
    if problem:
        raise ValueError(problem)
    return summary


def read_finished(config: TrainConfig, processes: int = 1) -> dict[str, Any] | None:
    """Return what `finished_summary` does, for a run of so many processes of which this need not be one."""
    path = config.folder / "config.yaml"
    if path.exists() and config.resume == "auto":
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        refuse_changed_settings(str(config.folder), before, dataclasses.asdict(config) | {"processes": processes})
    path = config.folder / "summary.json"
    summary: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return summary


def use_recorded_statistics(config: TrainConfig) -> TrainConfig:
    """Return the settings with the mean and standard deviation that the run in OUTPUT was trained with."""
    path = config.folder / "config.yaml"
    if not path.exists():
        return config
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    return dataclasses.replace(config, mean=config.mean or before["mean"], std=config.std or before["std"])


def check_writable(output: Path) -> None:
    """Make the run's folder.

    Raises:
        ValueError: it cannot be written to.
    """
    if not process_state().is_main_process:
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output folder {output} cannot be written: {error.strerror}") from error


def settings_record(run: Run) -> dict[str, Any]:
    """Return every setting as resolved, which of them were left open, and the number of processes."""
    record = dataclasses.asdict(run.config)
    return record | {"left_open": run.left_open, "processes": run.accelerator.num_processes}


def refuse_changed_settings(where: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare the settings of a run with those it was begun with.

    Raises:
        ValueError: one that changes the result differs; the message names it.
    """
    for name in (*names_of("data", "result"), "processes"):
        if name not in before:
            continue
        both_open = name in before.get("left_open", ()) and (now[name] is None or name in now.get("left_open", ()))
        if not both_open and now[name] != before[name]:
            raise ValueError(
                f"{where} holds a run with {name}={before[name]}, not {now[name]}; "
                "give another --output, or --resume never to start over"
            )


def write_config(run: Run) -> None:
    """Write OUTPUT/config.yaml."""
    if run.accelerator.is_main_process:
        write_file(run.output / "config.yaml", to_yaml(settings_record(run) | {"versions": _versions()}))


def write_metrics(run: Run, lines: list[dict[str, Any]]) -> None:
    """Write OUTPUT/metrics.jsonl, a line an epoch."""
    if run.accelerator.is_main_process:
        write_file(run.output / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def measure(run: Run, split: Split, name: str, after_batch: Callable[[], None] | None = None) -> dict[str, Any]:
    """Evaluate the packaged-to-be model on a split that the processes share, with its dead units and sparsity."""
    processes = run.accelerator.num_processes
    # As many batches in each process, though the last may be empty: after_batch may wait for the others.
    count = math.ceil(math.ceil(run.sizes[name] / processes) / _EVAL_BATCH)
    order = [list(range(len(split)))[i * _EVAL_BATCH : (i + 1) * _EVAL_BATCH] for i in range(count)]
    batches = split.batches(order, run.config.workers)
    with count_units(run.evaluated) as units:
        mean, std = run.data_config["mean"], run.data_config["std"]
        result = evaluate_batches(run.evaluated, batches, mean, std, True, after_batch)
    if processes > 1:
        units.add_up_processes(run.accelerator.device)
    return {
        f"{name}_loss": result.loss,
        f"{name}_top1": result.top1,
        f"{name}_top5": result.top5,
        "dead_units": units.dead_units,
        "dead_elements": units.dead_elements,
        "activation_sparsity": units.sparsity,
    }


def finish(run: Run, state: Any, best: dict[str, Tensor], after_batch: Callable[[], None]) -> dict[str, Any]:
    """Test the best epoch, package it, and write summary.json last: its presence says that the run is finished."""
    config = run.config
    run.evaluated.load_state_dict(best)
    line = state.metrics[(state.best_epoch or len(state.metrics)) - 1]
    set_surrogate(run.evaluated, line["surrogate"], line["alpha"])
    test = measure(run, run.test, "test", after_batch)
    found = {**line, **test} if run.val is None else {**test, **line}
    summary = dict(
        model=config.model,
        surrogate=line["surrogate"],
        alpha=line["alpha"],
        parameters=sum(p.numel() for p in run.evaluated.parameters()),
        data=config.data,
        train_images=run.sizes["train"],
        val_images=run.sizes["val"],
        test_images=run.sizes["test"],
        bad_images=run.bad_images,
        epochs=config.epochs,
        seed=config.seed,
        processes=run.accelerator.num_processes,
        best_epoch=state.best_epoch,
        **{metric.key: found[metric.key] for metric in METRICS if metric.split != "train"},
        images_per_second=float(np.median([line["images_per_second"] for line in state.metrics])),
        peak_memory_bytes=peak_memory(run.accelerator.device),
        seconds=state.seconds,
        versions=_versions(),
    )
    if run.accelerator.is_main_process:
        settings = {name: getattr(config, name) for name in names_of("data", "result")}
        write_model_folder(
            run.output / "model",
            run.evaluated,
            config.model.split(".")[0],
            run.class_names,
            run.data_config,
            summary | {"settings": to_yaml(settings)},
        )
        write_file(run.output / "summary.json", json.dumps(summary, indent=2) + "\n")
    run.accelerator.wait_for_everyone()
    return summary


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use so far: the GPU's where there is one, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # Unix alone has it

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _versions() -> dict[str, str]:
    modules = (timm_sugar, timm, torch, accelerate)
    return {"python": platform.python_version()} | {m.__name__: str(m.__version__) for m in modules}
