"""Packaging a trained network as a Hub-ready folder: config.json, model.safetensors and the model card."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from .._timm import model_args as timm_arguments
from .._timm import save_config_for_hf
from ..convert import OURS_ALONE, stock_arguments
from ..layers import Activation
from ..models import is_own, stock_architecture
from ..models._weights import WEIGHTS
from ..surrogates import BUILT_IN
from .card import model_card
from .reload import check_reload


def write_model_folder(
    folder: Path,
    model: nn.Module,
    architecture: str,
    class_names: Sequence[str],
    data_config: dict[str, Any],
    run: dict[str, Any],
) -> None:
    """Write `folder` with config.json, model.safetensors and README.md, replacing an existing folder as a whole.

    If timm has the architecture, config.json names the stock one, so that timm and transformers load the folder
    without this package, as the equivalent plain ReLU network. The training activation is recorded under
    ``"timm_sugar"``, for `timm_sugar.create_model`. Before the folder is moved into place, it is loaded as described
    on its card, see `timm_sugar.hub.reload.check_reload`.

    Args:
        folder: Output folder.
        model: A model built by `timm.create_model`, on any device.
        architecture: Its registered name.
        class_names: Names of the classes, in the order of the logits.
        data_config: input_size, interpolation, mean, std and crop_pct of the evaluation transform.
        run: Content of the card, see `timm_sugar.hub.card.model_card`.

    Raises:
        ValueError: the number of class names is not that of the logits, or the package does not load, or loads as a
            different network. No files are left, and an existing folder stays.
    """
    if len(class_names) != model.num_classes:
        raise ValueError(f"{len(class_names)} class names for a model of {model.num_classes} classes")
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    staging = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        config = _write_config(staging / "config.json", model, architecture, class_names, data_config)
        save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        (staging / "README.md").write_text(model_card(config, run), encoding="utf-8")
        check_reload(staging, model)
    except BaseException:
        shutil.rmtree(staging)
        raise
    _replace_folder(staging, folder)


def _write_config(
    path: Path, model: nn.Module, architecture: str, class_names: Sequence[str], data_config: dict[str, Any]
) -> dict[str, Any]:
    activation = Activation.of(model)
    record = dict(architecture=architecture, surrogate=activation.surrogate, alpha=activation.alpha)
    given = (timm_arguments(model) or {}).get("act_layer")
    stock = stock_architecture(architecture)
    arguments = stock_arguments(model, stock) if stock else None
    if arguments is None:  # timm has no equivalent: keep our architecture, which timm alone cannot load
        stock, hidden = architecture, {"num_classes"}
        if is_own(architecture) and activation.surrogate not in (None, *BUILT_IN):
            hidden |= {"surrogate", "alpha"}  # registered only in this process; the record has them
    else:
        hidden = {"num_classes", *OURS_ALONE, *({"act_layer"} - arguments.keys())}
        if given and not arguments and activation.surrogate is None:
            record["act_layer"] = "relu"  # not the default of the recorded architecture
    save_config_for_hf(
        model,
        str(path),
        model_config=dict(architecture=stock, label_names=list(class_names), dtype="float32", timm_sugar=record),
        model_args={"act_layer": None} if arguments == {} and given else arguments,
        data_config=data_config,
    )
    config: dict[str, Any] = json.loads(path.read_text())
    # transformers passes num_classes itself and fails on a duplicate.
    config["model_args"] = {k: v for k, v in config.get("model_args", {}).items() if k not in hidden}
    config["pretrained_cfg"]["hf_hub_filename"] = WEIGHTS  # so that timm does not fall back to a pickled .bin
    path.write_text(json.dumps(config, indent=2) + "\n")
    return config


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
