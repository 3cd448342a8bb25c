"""Packaging a trained network as a Hub-ready folder: config.json, model.safetensors and the model card."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from timm.layers import get_act_layer
from torch import nn

from .._timm import model_args as timm_arguments
from .._timm import save_config_for_hf
from ..layers import BSiLU, NeLU, Sugar
from ..models import stock_architecture
from ..models._weights import WEIGHTS
from .card import model_card

_OWN_ARGUMENTS = ("surrogate", "alpha", "save", "zero_init_last")


def surrogate_of(model: nn.Module) -> tuple[str | None, float | None]:
    """Return surrogate and alpha of a network's SUGAR activations, (None, None) where it has none.

    Raises:
        ValueError: its activations differ from each other.
    """
    found = {(m.surrogate, m.alpha) for m in model.modules() if isinstance(m, Sugar)}
    if len(found) > 1:
        raise ValueError(f"the network mixes surrogates: {sorted(found, key=str)}")
    return found.pop() if found else (None, None)


def write_model_folder(
    folder: Path,
    model: nn.Module,
    architecture: str,
    class_names: Sequence[str],
    data_config: dict[str, Any],
    run: dict[str, Any],
) -> None:
    """Write `folder` with config.json, model.safetensors and README.md, replacing an earlier one as a whole.

    Where timm has the architecture, config.json names the stock one, so that timm and transformers load the folder
    without this package, as the plain ReLU network that it is at inference. What it was trained with is recorded
    under ``"timm_sugar"``, for `timm_sugar.create_model`.

    Args:
        folder: Output folder.
        model: A model built by `timm.create_model`, on any device.
        architecture: The registered name that it was built by.
        class_names: Names of the classes, in the order of the logits.
        data_config: input_size, interpolation, mean, std and crop_pct of the evaluation transform.
        run: What the card tells, see `timm_sugar.hub.card.model_card`.

    Raises:
        ValueError: as many class names as logits are needed.
    """
    if len(class_names) != model.num_classes:
        raise ValueError(f"{len(class_names)} class names for a model of {model.num_classes} classes")
    folder = Path(folder)
    staging = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)

    surrogate, alpha = surrogate_of(model)
    stock, model_args = _as_stock(model, architecture)
    record = dict(architecture=architecture, surrogate=surrogate, alpha=alpha)
    if surrogate is None and stock and not model_args and (timm_arguments(model) or {}).get("act_layer"):
        record["act_layer"] = "relu"  # which the architecture of the record does not have by itself
    save_config_for_hf(
        model,
        str(staging / "config.json"),
        model_config=dict(
            architecture=stock or architecture,
            label_names=list(class_names),
            dtype="float32",
            timm_sugar=record,
        ),
        model_args=model_args,
        data_config=data_config,
    )
    config = json.loads((staging / "config.json").read_text())
    # transformers passes num_classes itself and fails on a second one.
    hidden = ("num_classes", *(_OWN_ARGUMENTS if stock else ()), *(() if model_args else ("act_layer",)))
    config["model_args"] = {k: v for k, v in config.get("model_args", {}).items() if k not in hidden}
    config["pretrained_cfg"]["hf_hub_filename"] = WEIGHTS  # so that timm does not fall back to a pickled .bin
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
    (staging / "README.md").write_text(model_card(config, run), encoding="utf-8")

    _replace_folder(staging, folder)


def _as_stock(model: nn.Module, architecture: str) -> tuple[str | None, dict[str, Any]]:
    """Return the timm architecture that the network plainly is, and its act_layer; None where timm has none.

    timm alone has neither B-SiLU nor NeLU, so a network that has them in both passes is one of ours.
    """
    stock, given = stock_architecture(architecture), (timm_arguments(model) or {}).get("act_layer")
    if given is None:
        return stock, {}
    if not isinstance(given, str) or (stock and given.startswith("sugar_")):
        given = "relu"
    if stock not in (None, architecture):
        if get_act_layer(given) in (BSiLU, NeLU):
            return None, {"act_layer": given}
        try:
            timm.create_model(stock, act_layer=given, device="meta")
        except TypeError:  # VGG takes no names, and has ReLU by itself
            return (stock, {}) if given == "relu" else (None, {"act_layer": given})
    return stock, {"act_layer": given}


def _replace_folder(staging: Path, folder: Path) -> None:
    for path in staging.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    staging.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
