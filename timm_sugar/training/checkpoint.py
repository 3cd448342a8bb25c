"""Atomic checkpoints: written to a temporary folder with a manifest of hashes, renamed, then pruned."""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import read_mapping, write_file
from ..models._download import file_hash

# 1: the manifest maps file names to SHA-256. 2: it holds the format version and that mapping. 3: adds unit counts.
FORMAT = 3
KEPT = 2  # the newest, and its predecessor in case a file is damaged
_MANIFEST = "manifest.json"
_PROGRESS = "progress.json"

Weights = dict[str, Tensor]


@dataclass
class State:
    """Progress of a run: the content of a checkpoint besides weights and optimizer state."""

    epoch: int = 0  # finished epochs
    position: int = 0  # finished steps of the current epoch
    loss_sums: list[float] | None = None  # over those steps, one value per process
    unit_counts: dict[str, Any] | None = None  # over those steps, summed over the processes
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    best_epoch: int | None = None
    metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    origin: str | None = None  # the checkpoint given to --resume, if the run started from one

    def stops_early(self, patience: int | None) -> bool:
        """Whether the validation accuracy has not improved for `patience` epochs."""
        return patience is not None and self.epoch - (self.best_epoch or 0) >= patience


@dataclass(frozen=True)
class Checkpoint:
    """Everything needed to resume a run."""

    weights: Weights
    best: Weights | None  # of the best epoch so far
    optimizer: dict[str, Any]  # state of optimizer, gradient scaler and moving average, loadable with weights_only
    state: State  # everything else, as JSON


def write_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, keep: int = KEPT) -> Path:
    """Write ``folder/step-<step>``, then remove checkpoints older than the newest `keep` complete ones.

    Raises:
        OSError: the disk is full or read-only; the last complete checkpoint is kept, and the message names it.
    """
    final = folder / f"step-{step:09d}"
    progress = dataclasses.asdict(checkpoint.state)
    if is_complete(final) and json.loads((final / _PROGRESS).read_text()) == progress:
        return final
    staging = folder / f"{final.name}.tmp"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        save_file(_on_cpu(checkpoint.weights), staging / "model.safetensors")
        if checkpoint.best is not None:
            save_file(_on_cpu(checkpoint.best), staging / "best.safetensors")
        torch.save(checkpoint.optimizer, staging / "optimizer.pt")
        (staging / _PROGRESS).write_text(json.dumps(progress))
        hashes = {path.name: _sha256(path) for path in sorted(staging.iterdir())}
        write_file(staging / _MANIFEST, json.dumps({"format": FORMAT, "sha256": hashes}, indent=2))
        shutil.rmtree(final, ignore_errors=True)  # a damaged one, or the same step before its validation
        staging.rename(final)
        _fsync(folder)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, (OSError, RuntimeError, SafetensorError)):  # raised when the disk is full
            raise OSError(f"checkpoint {final} cannot be written: {error}; {name_latest(folder)}") from error
        raise
    kept = 1
    for old in reversed([path for path in list_checkpoints(folder) if path.name < final.name]):
        if kept == keep:
            shutil.rmtree(old, ignore_errors=True)
        else:
            kept += is_complete(old)
    for left_over in folder.glob("step-*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)
    return final


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, or raise ValueError if it is incomplete or was written by a newer version."""
    if not is_complete(path):
        raise ValueError(f"{path} is not a complete checkpoint")
    best = path / "best.safetensors"
    return Checkpoint(
        weights=load_file(path / "model.safetensors"),
        best=load_file(best) if best.exists() else None,
        optimizer=torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
        state=read_state(path),
    )


def read_state(path: Path) -> State:
    """Return the progress stored in a complete checkpoint."""
    return State(**read_mapping(path / _PROGRESS))


def checkpoint_to_resume(folder: Path, resume: str) -> Path | None:
    """Return the checkpoint to resume from: None for "never", the newest checkpoint in `folder` for "auto".

    For the path of a checkpoint, return the newest checkpoint in `folder` of a run that started from it, so that the
    same command resumes after a stop; if there is none, return the path.
    """
    if resume in ("auto", "never"):
        return latest_checkpoint(folder) if resume == "auto" else None
    return latest_checkpoint(folder, origin_of(resume)) or Path(resume)


def origin_of(resume: str) -> str | None:
    """Return the value of `State.origin` for a value of --resume: the absolute path of a checkpoint, or None."""
    return None if resume in ("auto", "never") else str(Path(resume).resolve())


def latest_checkpoint(folder: Path, origin: str | None = None) -> Path | None:
    """Return the newest complete checkpoint in `folder`, of this origin if given; None if there is none."""
    for path in reversed(list_checkpoints(folder)):
        if is_complete(path) and origin in (None, read_state(path).origin):
            return path
    return None


def name_latest(folder: Path) -> str:
    """Return the end of an error message, which names the newest complete checkpoint."""
    path = latest_checkpoint(folder)
    return f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder` by step, complete or not."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".tmp")


def is_complete(path: Path) -> bool:
    """Whether all files match the hashes in the manifest; ValueError if a newer version wrote the checkpoint."""
    try:
        manifest = read_mapping(path / _MANIFEST)
        written = int(manifest.get("format", 1))
    except (OSError, ValueError, TypeError):
        return False
    if written > FORMAT:
        raise ValueError(f"{path} is of checkpoint format {written}; this version of timm-sugar reads up to {FORMAT}")
    hashes = manifest if written == 1 else manifest.get("sha256")
    if not isinstance(hashes, dict) or _PROGRESS not in hashes:
        return False
    try:
        return all(_sha256(path / name) == digest for name, digest in hashes.items())
    except OSError:
        return False


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return file_hash(path)


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
