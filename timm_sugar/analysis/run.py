"""Reading the folder of a run, finished or not."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

_KEYS = {  # without which a file of a run cannot be shown
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
        folder: Where it is.
        settings: config.yaml.
        metrics: The lines of metrics.jsonl; none before the first epoch has ended.
        summary: summary.json; None where the run is not finished.
        profile: profile.json, None where there is none.
        landscape: landscape.json, None where there is none.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None
    profile: dict[str, Any] | None
    landscape: dict[str, Any] | None

    @property
    def best_line(self) -> dict[str, Any]:
        """The metrics of the epoch that counts: the best so far by validation accuracy, or else the last."""
        validated = [line for line in self.metrics if finite(line.get("val_top1")) is not None]
        if validated:
            return max(validated, key=lambda line: line["val_top1"])
        return self.metrics[-1] if self.metrics else {}

    @property
    def activation(self) -> str:
        """The activation as text, such as "SUGAR bsilu 1.67"."""
        line = self.summary or (self.metrics[-1] if self.metrics else self.settings)
        if line.get("surrogate"):
            alpha = line.get("alpha")
            return f"SUGAR {line['surrogate']}{'' if alpha is None else f' {alpha:g}'}"
        return self.settings.get("act_layer") or "the model's own"

    @property
    def look(self) -> str:
        """The activation as `assign_styles` takes it."""
        line = self.summary or (self.metrics[-1] if self.metrics else self.settings)
        return line.get("surrogate") or self.settings.get("act_layer") or ""

    @property
    def landscape_is_complete(self) -> bool:
        """Whether there is a landscape with all its points, and finite losses among them."""
        found = self.landscape
        if found is None or found["done"] < len(found["axis"]) ** 2 or found["sharpness"] is None:
            return False
        return any(loss is not None for row in found["loss"] for loss in row)


def read_run(folder: Path, name: str) -> RunRecord:
    """Read the files of a run, finished or not.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: one of its files cannot be read.
    """
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"{folder} is no run's folder: it has no config.yaml")

    def read(file: str, parse: Callable[[str], Any], kind: type) -> Any:
        path = folder / file
        if not path.is_file():
            return None
        try:
            content = parse(path.read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(content, kind):
            raise ValueError(f"{path} cannot be read: it is no {kind.__name__}")
        lines: Any = content if kind is list else [content]
        missing = [key for line in lines for key in _KEYS[file] if key not in line]
        if missing:
            raise ValueError(f"{path} cannot be read: it has no {missing[0]}")
        return content

    def parse_lines(text: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in text.splitlines()]
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("a line of it is no dict")
        return lines

    return RunRecord(
        name=name,
        folder=folder,
        settings=read("config.yaml", yaml.safe_load, dict),
        metrics=read("metrics.jsonl", parse_lines, list) or [],
        summary=read("summary.json", json.loads, dict),
        profile=read("profile.json", json.loads, dict),
        landscape=read("landscape.json", json.loads, dict),
    )


def unique_names(paths: Sequence[str | PurePath]) -> list[str]:
    """Return the last part of each path, or as many parts as tell them apart.

    Raises:
        ValueError: a path is there twice.
    """
    parts = [Path(path).resolve().parts if Path(path).exists() else PurePath(path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("the same folder is given twice")


def finite(value: Any) -> float | None:
    """Return a finite number as it is, and None for anything else."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if real else None
