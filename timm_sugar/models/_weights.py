"""Locations of published weights, and the validation of a published config.json."""

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, is_model
from torch import Tensor

from .._timm import parse_model_config
from ..convert import ACTIVATION_ARGUMENTS, NOT_EXPRESSED, read_note
from ..layers import Activation
from ._download import check_token, download, reach_hub

ORGANISATION = "timm-sugar"
WEIGHTS = "model.safetensors"
_PICKLE = "pytorch_model.bin"
_WRAPPER = "timm_model."  # prefix of the model in transformers' TimmWrapper
CHECKOUT = Path(__file__).parents[2] / "hub_cards"  # not in a wheel
_MOST_PIXELS = 4096  # per side, before and after the crop

# Set by the caller, never read from a file: sources of weights, and arguments that timm handles itself.
_SOURCES = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"}
_NOT_MODEL_ARGUMENTS = {
    *("model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
    *("scriptable", "exportable", "no_jit", "pretrained_model_args", "pretrained_strict", "pretrained_filter_fn"),
}
# Arguments that every entrypoint takes from its pretrained_cfg, or that have no effect once weights are loaded. timm
# does not record drop rates, which have no effect at inference.
_OF_ANY_ENTRYPOINT = {"num_classes", "in_chans", "global_pool", "img_size", "zero_init_last", "ls_init_value"}


@dataclass(frozen=True)
class PublishedConfig:
    """The validated content of a published config.json.

    Attributes:
        source: ``hf-hub:ORG/NAME`` or ``local-dir:FOLDER``.
        architecture: Name in timm's registry; the one recorded by this package if there is a record.
        activation: The recorded surrogate, alpha and save, or act_layer if the network has no surrogate.
        model_args: The other arguments of the model.
        pretrained_cfg: For timm: input, classes, and the location of the weights, or the weights as ``"state_dict"``
            if timm cannot read their file.
        of_transformers: transformers' TimmWrapper wrote it, and it records no activation.
    """

    source: str
    architecture: str
    activation: Activation
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    of_transformers: bool = False

    def check_arguments(self, variant: str) -> None:
        """Raise RuntimeError if the weights need arguments that differ from the defaults of `variant`."""
        others = {k: v for k, v in self.model_args.items() if k not in _OF_ANY_ENTRYPOINT}
        if others:
            given = ", ".join(f"{k}={v!r}" for k, v in others.items())
            raise RuntimeError(
                f"{self.source} is a {variant} with {given}, which the name alone does not stand for; "
                f"load it with timm_sugar.create_model({self.source!r}, pretrained=True)"
            )


def find_weights(variant: str, tag: str | None, cache_dir: str | None = None) -> str:
    """Return the source of the weights that are published for one of our models.

    Args:
        variant: Name of the entrypoint.
        tag: Tag of the weights; None for the default one, the first in `default_cfgs` or the only one.
        cache_dir: Replaces huggingface_hub's cache.

    Returns:
        ``local-dir:FOLDER`` or ``hf-hub:ORG/NAME``, see `list_weights`.

    Raises:
        RuntimeError: there are no weights; the message names the places searched and the existing tags.
        PermissionError: the Hub rejects the token.
    """
    found, place = _look(variant, cache_dir)
    default = [cfg_tag for cfg_tag in _registered(variant) if cfg_tag in found] or [*found][: len(found) == 1]
    wanted = tag or (default[0] if default else None)
    if wanted not in found:
        name = variant if tag is None else f"{variant}.{tag}"
        exist = f"it has {', '.join(f'{variant}.{t}' for t in found)}" if found else f"it has none of {variant}"
        raise RuntimeError(f"No pretrained weights exist for {name} in {place}; {exist}. {_how_to_train(variant)}")
    return found[wanted]


def _how_to_train(variant: str) -> str:
    return (
        f"Train them with a script of train/, --model {variant}, and load OUTPUT/model with "
        "timm_sugar.create_model('local-dir:OUTPUT/model', pretrained=True)"
    )


def read_published(variant: str, tag: str | None, cache_dir: str | None = None) -> PublishedConfig:
    """Return the published config for one of our models and a tag, or the default tag.

    Args:
        variant, tag, cache_dir: As for `find_weights`.

    Raises:
        RuntimeError: nothing is published, it cannot be downloaded, or the weights need arguments that differ from
            the defaults of `variant`.
        ValueError: as `read_config`.
    """
    source = find_weights(variant, tag, cache_dir)
    try:
        found = read_config(source, cache_dir)
    except OSError as error:
        name = source.rpartition("/")[2]
        there = ", ".join(f"{variant}.{t}" for t in list_weights(variant, cache_dir))
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise RuntimeError(
            f"The weights {source} cannot be loaded: {reason}. The tags are {there}. TIMM_SUGAR_HUB may name a folder "
            f"that holds {name}, as hub_cards of a checkout does. {_how_to_train(variant)}"
        ) from error
    found.check_arguments(variant)
    return found


def list_weights(variant: str, cache_dir: str | None = None) -> dict[str, str]:
    """Return the published tags for one of our models, each with its source.

    TIMM_SUGAR_HUB can name a folder of published folders, or another organisation on the Hub; if the Hub cannot be
    reached, the cache is searched. If it is not set, the tags are those in `default_cfgs`, in the default organisation;
    in a checkout of this package, the folders in hub_cards take precedence.

    Raises:
        PermissionError: the Hub rejects the token.
        RuntimeError: TIMM_SUGAR_HUB names neither a folder nor an organisation.
    """
    return _look(variant, cache_dir)[0]


def _registered(variant: str) -> dict[str, str]:
    """Return the tags with weights of one of our models in `default_cfgs`, each with its repository."""
    cfgs = get_arch_pretrained_cfgs(variant).values()
    return {cfg.tag: cfg.hf_hub_id for cfg in cfgs if cfg.hf_hub_id and cfg.tag}


def _look(variant: str, cache_dir: str | None) -> tuple[dict[str, str], str]:
    """Return the sources of one of our models by tag, and a description of the place searched."""
    hub = os.environ.get("TIMM_SUGAR_HUB", "")
    folder = Path(hub).expanduser()
    if not hub:
        on_hub = {tag: f"hf-hub:{repo_id}" for tag, repo_id in _registered(variant).items()}
        if not CHECKOUT.is_dir():
            return on_hub, f"{ORGANISATION} on the Hub"
        return on_hub | _in_folder(variant, CHECKOUT), f"{CHECKOUT} or in {ORGANISATION} on the Hub"
    if folder.is_dir():
        return _in_folder(variant, folder), f"the folder {hub} (TIMM_SUGAR_HUB)"
    if not re.fullmatch(r"[\w-][\w.-]*", hub):
        raise RuntimeError(f"TIMM_SUGAR_HUB={hub} is neither an existing folder nor an organisation of the Hub")
    place = f"the organisation {hub} on the Hub (TIMM_SUGAR_HUB)"
    try:
        reach_hub()
        found = HfApi().list_models(author=hub, search=f"{variant}.")  # retries by itself
        names = [model.id.partition("/")[2] for model in found]
    except (OfflineModeIsEnabled, HfHubHTTPError, httpx.HTTPError, ConnectionError) as error:
        if isinstance(error, HfHubHTTPError):
            check_token(error)
        place += ", which cannot be reached, so that the cache was looked into"
        cache = Path(cache_dir or constants.HF_HUB_CACHE)
        names = [path.name.rpartition("--")[2] for path in cache.glob(f"models--{hub}--{variant}.*")]
    tags = sorted(name.removeprefix(f"{variant}.") for name in names if name.startswith(f"{variant}."))
    return {tag: f"hf-hub:{hub}/{variant}.{tag}" for tag in tags}, place


def _in_folder(variant: str, folder: Path) -> dict[str, str]:
    names = sorted(path.parent.name for path in folder.glob(f"{variant}.*/config.json"))
    return {name.removeprefix(f"{variant}."): f"local-dir:{folder / name}" for name in names}


def read_config(source: str, cache_dir: str | None = None, weights: bool = True) -> PublishedConfig:
    """Read and validate the config.json of a published model: only arguments of a registered model are accepted.

    This package, timm's `save_for_hf`, or transformers' TimmWrapper may have written it.

    Args:
        source: ``hf-hub:ORG/NAME``, with or without ``@REVISION``, or ``local-dir:FOLDER``.
        cache_dir: Replaces huggingface_hub's cache.
        weights: Check the weights too: safetensors, with the hash from the Hub. A folder may hold pytorch_model.bin
            instead, from which only tensors are read.

    Raises:
        ValueError: the file is not a model's config.json, names an unregistered model or weights that are not
            safetensors, has arguments that are not those of a model, or does not match the weights; or it cannot
            express how the network was converted.
        OSError: the repository or folder does not exist, or one of its files is missing or corrupted.
    """
    kind, _, model_id = source.partition(":")
    wanted = ["config.json", WEIGHTS] if weights else ["config.json"]
    if kind == "hf-hub":
        repo_id, _, revision = model_id.partition("@")
        paths = [download(repo_id, wanted[0], revision or None, cache_dir)]
        commit = paths[0].parent.name  # take the weights from the same commit
        paths += [download(repo_id, name, commit, cache_dir) for name in wanted[1:]]
        where = {"hf_hub_id": f"{repo_id}@{commit}", "hf_hub_filename": WEIGHTS, "source": "hf-hub"}
    else:
        paths = [Path(model_id, name) for name in wanted]
        if weights and not paths[1].is_file() and Path(model_id, _PICKLE).is_file():
            paths[1] = Path(model_id, _PICKLE)
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{model_id} is no published model: it has no {path.name}")
        where = {"file": model_id, "source": "local-dir"}
    try:
        config = json.loads(paths[0].read_text(encoding="utf-8"))
        wrapped = unwrap(config)
        cfg, architecture, model_args = parse_model_config(config)
        record = config.get("timm_sugar")
        if record is None and (noted := read_note(cfg)) is not None:
            record = {"architecture": architecture} | noted
        if record == {"architecture": architecture} | NOT_EXPRESSED:
            raise ValueError(
                "its network was converted in a way that it does not express (a part of the activations, say); build "
                "it, convert it in the same way and load its state dict"
            )
        architecture, activation = _read_record(record, architecture, model_args)
        if not is_model(architecture):
            raise ValueError(f"it names {architecture!r}, which is no model of timm's registry")
        refused = sorted(_NOT_MODEL_ARGUMENTS & model_args.keys())
        if refused:
            raise ValueError(f"its model_args hold {', '.join(refused)}, which are not arguments of a model")
        file = cfg.get("hf_hub_filename") or WEIGHTS
        if file not in (WEIGHTS, _PICKLE):  # timm prefers the former if both exist
            raise ValueError(f"it names {file!r} as its weights; only {WEIGHTS} is loaded")
        fields = {field.name for field in dataclasses.fields(PretrainedCfg)} - _SOURCES
        cfg = {key: value for key, value in cfg.items() if key in fields} | where
        others = {key: value for key, value in model_args.items() if key not in ACTIVATION_ARGUMENTS}
        _check_sizes(cfg, others)
        if weights:
            pickled, prefix = paths[1].name == _PICKLE, _WRAPPER if wrapped else ""
            tensors = _read_pickle(paths[1]) if pickled else None
            held = {name: tensor.numel() for name, tensor in tensors.items()} if tensors else _sizes(paths[1])
            held = {name.removeprefix(prefix): size for name, size in held.items()}
            _check_shapes(held, paths[1].name, architecture, cfg, others)
            if pickled or wrapped:
                tensors = tensors or load_file(paths[1])
                tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
                cfg |= {"state_dict": tensors, "source": ""}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"config.json of {model_id} cannot be used: {reason}") from error
    return PublishedConfig(source, architecture, activation, others, cfg, wrapped and activation == Activation())


def unwrap(config: dict[str, Any]) -> bool:
    """Convert a config.json of transformers' TimmWrapper to timm's format, in place; return whether it was one.

    Raises:
        ValueError: it belongs to another transformers model.
    """
    kind = config.get("model_type")
    if kind is not None and kind != "timm_wrapper" and "architecture" not in config:
        raise ValueError(
            f"it is of transformers' {kind}, which timm does not build; load it with transformers, after "
            "`import timm_sugar.transformers`"
        )
    if kind != "timm_wrapper":
        return False
    config["model_args"] = config.get("model_args") or {}
    # transformers builds the model with timm's defaults; if the image size is fixed, that is the default size.
    default = timm.get_pretrained_cfg(config["architecture"]) if is_model(config["architecture"]) else None
    if default is not None:
        config["pretrained_cfg"] = config.get("pretrained_cfg") or default.to_dict()
        if default.fixed_input_size:
            config["model_args"].setdefault("img_size", default.input_size[1:])
    for name in ("hf_hub_filename", "custom_load", "label_offset"):  # these describe the file that timm publishes
        config["pretrained_cfg"].pop(name, None)
    names = config.get("label_names") or []
    if names == [f"LABEL_{number}" for number in range(len(names))]:  # placeholders, not names
        config.pop("label_names", None)
    return True


def _read_record(record: Any, architecture: str, model_args: dict[str, Any]) -> tuple[str, Activation]:
    given = {key: model_args[key] for key in ACTIVATION_ARGUMENTS if model_args.get(key) is not None}
    if record is not None:
        architecture = record["architecture"]
        recorded = {key: record[key] for key in ("surrogate", "alpha", "save") if record.get(key) is not None}
        # With a surrogate, act_layer is only the ReLU for loaders without this package.
        plain = {"act_layer": record.get("act_layer", given.get("act_layer")), "alpha": given.get("alpha")}
        plain = {key: value for key, value in plain.items() if value is not None}
        given = recorded or (plain if "act_layer" in plain else {})
    kinds: dict[str, Any] = {"surrogate": str, "alpha": (int, float), "act_layer": str, "save": str}
    for key, value in given.items():
        if not isinstance(value, kinds[key]):
            raise ValueError(f"{key} is {value!r}")
    if not isinstance(architecture, str):
        raise ValueError(f"architecture is {architecture!r}")
    return architecture, Activation(**given)


def _check_sizes(cfg: dict[str, Any], model_args: dict[str, Any]) -> None:
    """Raise ValueError if images would be larger than those of any timm network."""
    given = model_args.get("img_size") or ()
    crop = float(cfg.get("crop_pct") or 1)
    for side in [*cfg.get("input_size", (3, 224, 224))[1:], *([given] if isinstance(given, int) else given)]:
        if not 0 < side <= _MOST_PIXELS or not 0 < side / crop <= _MOST_PIXELS:
            raise ValueError(f"it takes {side} pixels from {side / crop:.0f}; a side is at most {_MOST_PIXELS} pixels")


def _sizes(path: Path) -> dict[str, int]:
    try:
        with safe_open(path, "pt") as file:
            return {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path.name} is no safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path.name} is no file of tensors alone, and of a pickle nothing else is read; save {WEIGHTS}"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path.name} holds no state dict")
    return found


def _check_shapes(
    held: dict[str, int], file: str, architecture: str, cfg: dict[str, Any], model_args: dict[str, Any]
) -> None:
    """Raise ValueError if a weights file does not match the model, before memory is allocated for either."""
    try:
        with torch.device("meta"):
            model = timm.create_model(architecture, pretrained_cfg=cfg, **model_args)
    except RuntimeError as error:  # larger than torch can count
        raise ValueError(f"its model cannot be built: {error}") from error
    needed = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    # Compare element counts, not shapes, since timm converts the layout of some older weights on loading.
    for name in held.keys() & needed.keys():
        if held[name] != needed[name] and not cfg.get("label_offset"):
            raise ValueError(f"its model has {needed[name]:,} numbers in {name}, and {file} {held[name]:,}")
    if sum(needed.values()) > 2 * sum(held.values()):
        raise ValueError(
            f"its model has {sum(needed.values()):,} numbers, and {file} no more than {sum(held.values()):,}"
        )
