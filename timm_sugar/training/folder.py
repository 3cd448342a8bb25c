"""The folder of a run: the files written into it, and the check of settings against them on resume."""

import dataclasses
import json
import os
import platform
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
import yaml
from torch import nn

import timm_sugar

from ..files import to_yaml, write_file
from ..hub import write_model_folder
from ..settings import TrainConfig, names_of
from .images import Images
from .processes import from_main_process, process_state


def check_writable(output: Path) -> None:
    """Create the run's folder.

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


def finished_summary(config: TrainConfig) -> dict[str, Any] | None:
    """Return the summary of a finished run; None if it is unfinished or `resume` is "never".

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
    """The same for a run of `processes` processes, callable from any process."""
    before = read_record(config.folder)
    if before is not None and config.resume == "auto":
        check_unchanged(str(config.folder), before, dataclasses.asdict(config) | {"processes": processes})
    path = config.folder / "summary.json"
    summary: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return summary


def use_recorded_statistics(config: TrainConfig) -> TrainConfig:
    """Return the settings with the mean and standard deviation that the run in OUTPUT was trained with."""
    before = read_record(config.folder)
    if before is None:
        return config
    return dataclasses.replace(config, mean=config.mean or before["mean"], std=config.std or before["std"])


def read_record(output: Path) -> dict[str, Any] | None:
    """Return what OUTPUT/config.yaml holds, None where there is none."""
    path = output / "config.yaml"
    if not path.exists():
        return None
    record: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return record


def check_unchanged(where: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare the settings of a run, and its data where that is known, with those it was started with.

    Raises:
        ValueError: one that changes the result differs; the message names it.
    """
    remedy = "give another --output, or --resume never to start over"
    data, found = (record.get("data_fingerprint") or {} for record in (before, now))
    changed = [f"{name}={data[name]}, not {found[name]}" for name in data if data[name] != found.get(name, data[name])]
    if changed:
        raise ValueError(f"{where} holds a run on other data, with {'; '.join(changed)}; bring it back, {remedy}")
    for name in (*names_of("data", "result"), "processes"):
        if name not in before:
            continue
        not_resolved = now[name] is None and name in before.get("left_open", ())
        if not not_resolved and now[name] != before[name]:
            raise ValueError(f"{where} holds a run with {name}={before[name]}, not {now[name]}; {remedy}")
    ways = before.get("gradients"), now.get("gradients")
    if None not in ways and ways[0] != ways[1]:
        warnings.warn(f"{where}: gradients were computed by {ways[0]}, from here on by {ways[1]}", stacklevel=2)


def write_record(output: Path, settings: dict[str, Any], metrics: list[dict[str, Any]]) -> None:
    """Write OUTPUT/config.yaml and OUTPUT/metrics.jsonl."""
    write_file(output / "config.yaml", to_yaml(settings | {"versions": versions()}))
    write_metrics(output, metrics)


def write_metrics(output: Path, metrics: list[dict[str, Any]]) -> None:
    """Write OUTPUT/metrics.jsonl, one line per epoch."""
    write_file(output / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in metrics))


def write_result(
    output: Path, config: TrainConfig, network: nn.Module, images: Images, summary: dict[str, Any]
) -> None:
    """Write OUTPUT/model, then OUTPUT/summary.json, which marks the run as finished."""
    card = summary | {"settings": {name: getattr(config, name) for name in names_of("data", "result")}}
    architecture = config.model.split(".")[0]
    write_model_folder(output / "model", network, architecture, images.class_names, images.data_config, card)
    write_file(output / "summary.json", json.dumps(summary, indent=2) + "\n")


def begin_or_compare(output: Path, resume: str, settings: dict[str, Any]) -> None:
    """Remove an earlier run if `resume` is "never", else compare its settings and data with those of this run.

    Raises:
        ValueError: see `check_unchanged`.
    """
    record = None
    if process_state().is_main_process:
        if resume == "never":
            _start_over(output)
        record = read_record(output)
    check_unchanged(str(output), from_main_process(record) or {}, settings)


def _start_over(output: Path) -> None:
    """Remove configuration, summary, metrics and checkpoints of an earlier run."""
    for name in ("config.yaml", "summary.json", "metrics.jsonl"):
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages that determine a result."""
    modules = (timm_sugar, timm, torch, accelerate)
    return {"python": platform.python_version()} | {m.__name__: str(m.__version__) for m in modules}


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the GPU if there is one, else the resident set size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # Unix only

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
