"""Load a package in a separate process with each library that its card names, and compare the logits."""

import copy
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._timm import parse_model_config
from ..models import is_own
from ..models._weights import unwrap

_TOLERANCE = 1e-4  # relative to the largest logit: rounding differs between processes

# Run by `python -c`, so that this package is not imported first. It answers each line of JSON with one line.
_LOADER = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
if sys.argv[1] == "plugin":
    import timm_sugar
import timm, torch

def load(library, folder):
    if library == "transformers":
        from transformers import AutoModelForImageClassification
        return AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False)
    create = timm.create_model if library == "timm" else timm_sugar.create_model
    return create("local-dir:" + folder, pretrained=True)

for line in sys.stdin:
    folder, libraries, size = json.loads(line)
    images, answer = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)), {}
    for library in libraries:
        try:
            with torch.inference_mode():
                logits = load(library, folder).eval()(images)
            answer[library] = getattr(logits, "logits", logits).tolist()
        except Exception as error:
            answer[library] = f"{type(error).__name__}: {error}"
    if sys.argv[1] != "plugin" and "timm_sugar" in sys.modules:
        answer = {"timm": "timm_sugar was imported by another package"}
    print(json.dumps(answer), file=answers, flush=True)
"""


def loads_in(config: dict[str, Any]) -> str:
    """Return what loading a config.json needs: "timm" alone, timm with our "plugin", or "timm_sugar".

    The last is for timm architectures that timm cannot build with ReLU: `timm_sugar.create_model` must build them.
    """
    if is_own(config["architecture"]):
        return "plugin"
    return "timm_sugar" if "surrogate" in (config.get("model_args") or {}) else "timm"


def check_reload(folder: Path, model: nn.Module) -> None:
    """Load a folder in another process as described on its card, and compare the logits with `model` on fixed images.

    If config.json names an architecture of timm, this uses timm without this package, and transformers if installed;
    only transformers for a folder that it wrote.

    Raises:
        ValueError: it does not load, or the logits differ.
        RuntimeError: the process did not answer.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    needs = loads_in(config)
    own, wrapped = "timm_sugar" in config, unwrap(config)
    libraries = [] if wrapped else ["timm"]
    if (own or wrapped) and find_spec("transformers") is not None:
        libraries.append("transformers")
    if needs == "timm_sugar":
        libraries = ["timm_sugar"]
    plain = copy.deepcopy(model).cpu().float().eval()
    size = parse_model_config(config)[0].get("input_size", (3, 224, 224))
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = plain(images).clone()
    if not torch.isfinite(logits).all():
        raise ValueError(f"the network of {folder} gives logits that are not finite")
    tolerance = _TOLERANCE * logits.abs().max().item() + 1e-6
    for library, answer in _ask(needs != "timm", [str(folder.resolve()), libraries, size]).items():
        where = library if needs != "timm" else f"{library} without timm_sugar"
        if isinstance(answer, str):
            raise ValueError(f"{where} does not load the package: {' '.join(answer.split())[:500]}")
        found = torch.tensor(answer)
        if found.shape != logits.shape:
            raise ValueError(f"{where} loads the package as another network: logits of shape {tuple(found.shape)}")
        if not (difference := (found - logits).abs().max().item()) <= tolerance:
            raise ValueError(f"{where} loads the package as another network: logits differ by {difference:.3g}")


def _ask(plugin: bool, request: list[Any]) -> dict[str, list[Any] | str]:
    loader: Any = _loader(plugin)  # Any: its streams are not None
    try:
        loader.stdin.write(json.dumps(request) + "\n")
        loader.stdin.flush()
        answer: dict[str, list[Any] | str] = json.loads(loader.stdout.readline())
    except (OSError, ValueError) as error:
        _loader.cache_clear()
        loader.kill()
        raise RuntimeError(f"the process that loads a package back ended with status {loader.wait()}") from error
    return answer


@cache
def _loader(plugin: bool) -> "subprocess.Popen[str]":
    """Start the process once, since importing torch takes longer than loading a network. It ends with this process."""
    launched = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(launched)}
    return subprocess.Popen(
        [sys.executable, "-c", _LOADER, "plugin" if plugin else "alone"],
        env=environment | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=tempfile.gettempdir(),  # the first entry of its sys.path
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
