"""Reading the folder of a run, finished or not."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

_KEYS = {  # required keys of each file
    "config.yaml": ("data", "model"),
    "metrics.jsonl": ("epoch",),
    "summary.json": (),
    "profile.json": ("images", "layers", "dead_units"),
    "landscape.json": ("settings", "axis", "loss", "done", "sharpness"),
}


@dataclass(frozen=True)
class RunRecord:
    """The content of a run's folder.

    Attributes:
        name: Name of the run on the page.
        settings: config.yaml.
        metrics: The lines of metrics.jsonl; none before the first epoch has ended.
        summary: summary.json; None if the run is not finished.
        profile: profile.json, or None.
        landscape: landscape.json; None if it does not exist, is incomplete, or has no finite loss.
    """

    name: str
    settings: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None
    profile: dict[str, Any] | None
    landscape: dict[str, Any] | None

    @property
    def best_line(self) -> dict[str, Any]:
        """The metrics of the best epoch so far by validation accuracy, or else of the last epoch."""
        validated = [line for line in self.metrics if finite(line.get("val_top1")) is not None]
        if validated:
            return max(validated, key=lambda line: line["val_top1"])
        return self.metrics[-1] if self.metrics else {}

    @property
    def activation(self) -> str:
        """The activation as text, such as "SUGAR bsilu 1.67"."""
        if surrogate := self._latest.get("surrogate"):
            alpha = self._latest.get("alpha")
            return f"SUGAR {surrogate}{'' if alpha is None else f' {alpha:g}'}"
        return self.settings.get("act_layer") or "the model's own"

    @property
    def look(self) -> str:
        """The activation as a name for `assign_styles`."""
        return self._latest.get("surrogate") or self.settings.get("act_layer") or ""

    @property
    def _latest(self) -> dict[str, Any]:
        return self.summary or (self.metrics[-1] if self.metrics else self.settings)


def read_run(folder: Path, name: str) -> RunRecord:
    """Read the files of a run, finished or not.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: one of its files cannot be read.
    """
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"{folder} is no run's folder: it has no config.yaml")

    def read(file: str) -> Any:
        return next(iter(_read(folder / file)), None)

    landscape = read("landscape.json")
    return RunRecord(
        name=name,
        settings=read("config.yaml"),
        metrics=_read(folder / "metrics.jsonl"),
        summary=read("summary.json"),
        profile=read("profile.json"),
        landscape=landscape if landscape and _is_complete(landscape) else None,
    )


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the mappings in a file, one, or by its suffix one per line; none if the file does not exist."""
    if not path.is_file():
        return []
    parse = yaml.safe_load if path.suffix == ".yaml" else json.loads
    by_line = path.suffix == ".jsonl"
    try:
        text = path.read_text(encoding="utf-8")
        found = [parse(part) for part in (text.splitlines() if by_line else [text])]
        for content in found:
            if not isinstance(content, dict):
                raise ValueError(f"{'a line of it' if by_line else 'it'} is no dict")
            if missing := [key for key in _KEYS[path.name] if key not in content]:
                raise ValueError(f"it has no {missing[0]}")
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return found


def _is_complete(landscape: dict[str, Any]) -> bool:
    if landscape["done"] < len(landscape["axis"]) ** 2 or landscape["sharpness"] is None:
        return False
    return any(loss is not None for row in landscape["loss"] for loss in row)


def unique_names(paths: Sequence[str | PurePath]) -> list[str]:
    """Return the last part of each path, or as many parts as needed to make the names unique.

    Raises:
        ValueError: a path occurs twice.
    """
    parts = [Path(path).resolve().parts if Path(path).exists() else PurePath(path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("the same folder is given twice")


def finite(value: Any) -> float | None:
    """Return a finite number unchanged, and None for anything else."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if real else None
