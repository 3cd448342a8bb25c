"""The folder of a run: writing its files, and checking settings against them on resume."""

import dataclasses
import itertools
import json
import platform
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

import timm_sugar

from ..data import listed
from ..files import read_mapping, remove_left_over, to_json, to_yaml, write_file
from ..hub import dataset_of, write_model_folder
from ..settings import TrainConfig, defaults, names_of
from .checkpoint import (
    Checkpoint,
    State,
    checkpoint_to_resume,
    is_complete,
    latest_checkpoint,
    list_checkpoints,
    origin_of,
    read_checkpoint,
    read_state,
)
from .images import Images
from .processes import from_main_process, process_state

_REMEDY = "give another --output, or --resume never to start over"
_RESULTS = ("summary.json", "metrics.jsonl", "model")
_DESCRIPTIONS = (  # written to a run's folder by timm-sugar's commands and trackers
    "profile.json", "landscape.json", "activation_profile.*", "dead_units.*", "gradient_norms.*", "landscape_*.*",
    "timm-sugar/events.out.tfevents.*",
)  # fmt: skip


def check_writable(output: Path) -> None:
    """Create the run's folder and remove temporary files of killed processes; ValueError if it is not writable."""
    if not process_state().is_main_process:
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_file(output / ".writable", "")
        (output / ".writable").unlink(missing_ok=True)
        for name in ("config.yaml", "summary.json", "metrics.jsonl", "profile.json", "landscape.json"):
            remove_left_over(output / name)
    except OSError as error:
        raise ValueError(f"output folder {output} cannot be written: {error.strerror}") from error


def finished_summary(config: TrainConfig) -> dict[str, Any] | None:
    """Return the summary of a finished run, in every process; None if it is unfinished or has no model."""
    return from_main_process(read_finished, config, process_state().num_processes)


def read_finished(config: TrainConfig, processes: int = 1) -> dict[str, Any] | None:
    """As `finished_summary`, in one process; ValueError if the run there, or at `resume`, has other settings."""
    if config.resume == "never":
        return None
    output, settings = config.folder, dataclasses.asdict(config) | {"processes": processes}
    before = _read_settings(output)
    check_unchanged(str(output), before, settings)
    path = checkpoint_to_resume(output / "checkpoints", config.resume)
    if path is not None and config.resume != "auto":
        if not is_complete(path):
            raise ValueError(f"{path} is not a complete checkpoint")
        check_unchanged(str(path), read_state(path).settings, settings)
    summary = output / "summary.json"
    finished = summary.exists() and (output / "config.yaml").exists() and _holds_model(output / "model")
    if finished and before.get("data", config.data) != config.data:
        raise ValueError(f"{output} holds a run with data={before['data']}, not {config.data}; {_REMEDY}")
    return read_mapping(summary) if finished else None


def _holds_model(folder: Path) -> bool:
    try:
        with safe_open(folder / "model.safetensors", "pt"):
            return (folder / "config.json").exists()
    except (OSError, SafetensorError):
        return False


def _read_settings(output: Path) -> dict[str, Any]:
    """Return the settings of the run in OUTPUT, of its newest checkpoint if config.yaml is missing, {} for no run."""
    record = read_record(output)
    if record is not None:
        return record
    latest = latest_checkpoint(output / "checkpoints")
    if latest is not None:
        return read_state(latest).settings
    results = [name for name in _RESULTS if (output / name).exists()]
    if results:
        raise ValueError(f"{output} holds {listed(results)} of unknown settings: it has no config.yaml; {_REMEDY}")
    return {}


def use_recorded_statistics(config: TrainConfig) -> TrainConfig:
    """Return the settings with the mean and standard deviation that the run in OUTPUT was trained with."""
    before = read_record(config.folder) or {}
    mean, std = config.mean or before.get("mean"), config.std or before.get("std")
    return dataclasses.replace(config, mean=mean, std=std)


def read_record(output: Path) -> dict[str, Any] | None:
    """Return the content of OUTPUT/config.yaml, None if the file does not exist."""
    path = output / "config.yaml"
    return read_mapping(path) if path.exists() else None


def check_unchanged(where: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError if the data, or a setting that changes the result, differ from those at the start of a run.

    If a fingerprint of the data is recorded, the data may have moved: their name is not compared, only the
    fingerprints if both are known.
    """
    data, found = (record.get("data_fingerprint") or {} for record in (before, now))
    changed = [f"{name}={data[name]}, not {found[name]}" for name in data if data[name] != found.get(name, data[name])]
    if changed:
        raise ValueError(f"{where} holds a run on other data, with {'; '.join(changed)}; bring it back, {_REMEDY}")
    known = defaults() | before if before else {}  # settings added in newer versions have their defaults
    # Given settings first: settings that were left open may differ because of them.
    for name in sorted((*names_of("data", "result"), "processes"), key=lambda name: now[name] is None):
        not_resolved = now[name] is None and name in before.get("left_open", ())
        if name not in known or not_resolved or (name == "data" and data):
            continue
        if now[name] != known[name]:
            raise ValueError(f"{where} holds a run with {name}={known[name]}, not {now[name]}; {_REMEDY}")
    ways = before.get("gradients"), now.get("gradients")
    if None not in ways and ways[0] != ways[1]:
        warnings.warn(f"{where}: gradients were computed by {ways[0]}, from here on by {ways[1]}", stacklevel=2)


def write_record(output: Path, settings: dict[str, Any]) -> None:
    """Write OUTPUT/config.yaml."""
    write_file(output / "config.yaml", to_yaml(settings | {"versions": versions()}))


def write_metrics(output: Path, metrics: list[dict[str, Any]]) -> None:
    """Write OUTPUT/metrics.jsonl, one line per epoch."""
    write_file(output / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in metrics))


def summarize(config: TrainConfig, network: nn.Module, images: Images, **measured: Any) -> dict[str, Any]:
    """Return the content of OUTPUT/summary.json: the model, the data and the `measured` values."""
    return dict(
        model=config.model,
        parameters=sum(p.numel() for p in network.parameters()),
        data=config.data,
        dataset_id=dataset_of(config.data)[0],
        **{f"{name}_images": size for name, size in images.sizes.items()},
        bad_images=images.bad,
        epochs=config.epochs,
        seed=config.seed,
        **measured,
        versions=versions(),
    )


def write_result(config: TrainConfig, network: nn.Module, images: Images, summary: dict[str, Any]) -> None:
    """Write OUTPUT/model, then OUTPUT/summary.json, which marks the run as finished."""
    output, architecture = config.folder, config.model.split(".")[0]
    card = summary | {"settings": {name: getattr(config, name) for name in names_of("data", "result")}}
    write_model_folder(output / "model", network, architecture, images.class_names, images.data_config, card)
    write_file(output / "summary.json", to_json(summary) + "\n")


def start_or_resume(config: TrainConfig, settings: dict[str, Any], step: Callable[[State], int]) -> Checkpoint | None:
    """Return the checkpoint to resume from, None for a new run; move files of another run or of later steps away.

    `step` returns the step number of a state.
    """
    output, resume = config.folder, config.resume

    def find() -> tuple[dict[str, Any], Checkpoint | None]:
        if resume == "never":
            described = sorted(path for pattern in _DESCRIPTIONS for path in output.glob(pattern))
            # The settings last: if this is interrupted, the remaining files still belong to their settings.
            names = (output / name for name in (*_RESULTS, "checkpoints"))
            _set_aside(output, "the earlier run", (*names, *described, output / "config.yaml"))
        path = checkpoint_to_resume(output / "checkpoints", resume)
        return _read_settings(output), None if path is None else read_checkpoint(path)

    record, checkpoint = from_main_process(find)  # other processes may run on machines without access to the folder
    state = State() if checkpoint is None else checkpoint.state
    state.origin = origin_of(resume) or state.origin
    check_unchanged(str(output), record, settings)
    check_unchanged(str(output) if resume == "auto" else resume, state.settings, settings)
    if process_state().is_main_process:
        last = step(state)
        later = [path for path in list_checkpoints(output / "checkpoints") if path.name > f"step-{last:09d}"]
        _set_aside(output, f"going on from step {last}; {listed([path.name for path in later])}", later)
    return checkpoint


def _set_aside(output: Path, what: str, paths: Iterable[Path]) -> None:
    """Move the existing `paths` to OUTPUT/earlier-N and print a message."""
    found = [path for path in paths if path.exists()]
    if not found:
        return
    places = (output / f"earlier-{number}" for number in itertools.count(1))
    place = next(path for path in places if not path.exists())
    for path in found:
        moved = place / path.relative_to(output)
        moved.parent.mkdir(parents=True, exist_ok=True)
        path.rename(moved)
    print(f"{what} set aside in {place}", file=sys.stderr)


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
