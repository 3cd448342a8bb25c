"""Atomic writing of files, and reading and writing JSON and YAML."""

import json
import os
import re
from collections.abc import Callable
from glob import escape
from pathlib import Path
from typing import Any

import yaml


def cache_folder() -> Path:
    """Return the cache of kernels and decoded images: $TIMM_SUGAR_CACHE, or timm_sugar in the user's cache folder."""
    own = os.environ.get("TIMM_SUGAR_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "timm_sugar")


def to_json(value: Any) -> str:
    """Return indented JSON with each list of numbers on a single line."""
    text = json.dumps(value, indent=2)
    return re.sub(r"\[\n([\d\s.,eE+-]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, flush it to disk and rename it to `path`. Text is UTF-8."""
    remove_left_over(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def remove_left_over(path: Path) -> None:
    """Remove the temporary files of `path` left by killed processes; those of running processes are kept."""
    for temporary in path.parent.glob(f"{escape(path.name)}.*.tmp"):
        pid = re.fullmatch(r"\.([1-9]\d*)\.tmp", temporary.name.removeprefix(path.name))
        if pid and not _is_alive(int(pid[1])):
            temporary.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # a process of another user
        pass
    return True


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a file that contains a mapping: YAML if it is named .yaml or .yml, else JSON.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file does not contain a mapping; the message is one line and names the file.
    """
    return _mapping(path, path.read_bytes(), yaml.safe_load if path.suffix in (".yaml", ".yml") else json.loads)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file with a JSON mapping on each line; raises as `read_mapping`."""
    return [_mapping(path, line, json.loads) for line in path.read_bytes().splitlines()]


def _mapping(path: Path, text: bytes, parse: Callable[[bytes], Any]) -> dict[str, Any]:
    try:
        content = parse(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read: it holds {content!r:.40}, not a mapping")
    return content


def to_yaml(settings: dict[str, Any]) -> str:
    """Return settings as YAML, in the given order."""
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
