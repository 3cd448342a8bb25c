"""Where published weights are, and what of a published config.json is believed."""

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, get_pretrained_cfg, is_model

from .._timm import parse_model_config
from ._download import download, refuse_bad_token

ORGANISATION = "timm-sugar"
WEIGHTS = "model.safetensors"

# Said by whoever loads, never by a file: sources of weights, and what timm takes before the model sees it.
_SOURCES = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"}
_NOT_MODEL_ARGUMENTS = {
    *("model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
    *("scriptable", "exportable", "no_jit", "pretrained_model_args", "pretrained_strict", "pretrained_filter_fn"),
}
# Arguments that every entrypoint takes from its pretrained_cfg, or whose effect is over once weights are loaded. Drop
# rates, which have none at inference, are not recorded by timm.
_OF_ANY_ENTRYPOINT = {"num_classes", "in_chans", "global_pool", "img_size", "zero_init_last", "ls_init_value", "save"}
_ACTIVATION = ("surrogate", "alpha", "act_layer")


@dataclass(frozen=True)
class PublishedConfig:
    """What a published config.json says, checked.

    Attributes:
        source: ``hf-hub:ORG/NAME`` or ``local-dir:FOLDER``.
        architecture: Name in timm's registry; the recorded one of this package where there is a record.
        recorded: Whether there is a record of this package.
        activation: The recorded surrogate and alpha, or act_layer where the network has none.
        model_args: Arguments of the model apart from those.
        pretrained_cfg: For timm: input, classes, and where the weights are.
    """

    source: str
    architecture: str
    recorded: bool
    activation: dict[str, Any]
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]

    def refuse_other_arguments(self, variant: str) -> None:
        """Raise RuntimeError where the weights need arguments that `variant` does not have by itself."""
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
        tag: Tag of the weights; None for the default one.
        cache_dir: In place of huggingface_hub's cache.

    Returns:
        ``local-dir:FOLDER`` in the folder that TIMM_SUGAR_HUB names, else ``hf-hub:ORG/NAME`` in the organisation that
        it names, else in the default one.

    Raises:
        RuntimeError: there are none, in one line that says where they were looked for and which tags exist.
        PermissionError: the Hub does not accept the token.
    """
    root, place, tags = _look(variant, cache_dir)
    cfg = get_pretrained_cfg(variant)
    default = cfg.tag if cfg else None
    wanted = tag or (default if default in tags else tags[0] if len(tags) == 1 else None)
    if wanted not in tags:
        name = variant if tag is None else f"{variant}.{tag}"
        exist = f"it has {', '.join(f'{variant}.{t}' for t in tags)}" if tags else f"it has none of {variant}"
        raise RuntimeError(f"No pretrained weights exist for {name} in {place}; {exist}. {_how_to_train(variant)}")
    return f"{root}/{variant}.{wanted}"


def _how_to_train(variant: str) -> str:
    return (
        f"Train them with a script of train/, --model {variant}, and load OUTPUT/model with "
        "timm_sugar.create_model('local-dir:OUTPUT/model', pretrained=True)"
    )


def read_published(variant: str, tag: str | None, cache_dir: str | None = None) -> PublishedConfig:
    """Return what is published for one of our models, under a tag or the default one.

    Args:
        variant, tag, cache_dir: As for `find_weights`.

    Raises:
        RuntimeError: there is nothing, it cannot be had from where it is to be, or the weights need other arguments
            than `variant` has by itself; in one line.
        ValueError: as `read_config`.
    """
    source = find_weights(variant, tag, cache_dir)
    try:
        found = read_config(source, cache_dir)
    except OSError as error:
        name = source.rpartition("/")[2]
        there = ", ".join(f"{variant}.{t}" for t in list_tags(variant, cache_dir))
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise RuntimeError(
            f"The weights {source} cannot be loaded: {reason}. The tags are {there}. TIMM_SUGAR_HUB may name a folder "
            f"that holds {name}, as hub_cards of a checkout does. {_how_to_train(variant)}"
        ) from error
    found.refuse_other_arguments(variant)
    return found


def list_tags(variant: str, cache_dir: str | None = None) -> list[str]:
    """Return the tags under which weights for one of our models are published, where `find_weights` looks.

    Those of the default organisation are the ones in `default_cfgs`; another organisation is asked over the network,
    and where that cannot be reached, the cache tells what has been loaded before.

    Raises:
        PermissionError: the Hub does not accept the token.
        RuntimeError: TIMM_SUGAR_HUB names neither a folder nor an organisation.
    """
    return _look(variant, cache_dir)[2]


def _look(variant: str, cache_dir: str | None) -> tuple[str, str, list[str]]:
    """Return the source that holds all published weights, the same in words, and the tags of one of our models."""
    hub = os.environ.get("TIMM_SUGAR_HUB", "")
    folder = Path(hub).expanduser()
    if not hub:
        tags = [cfg.tag for cfg in get_arch_pretrained_cfgs(variant).values() if cfg.hf_hub_id and cfg.tag]
        # The default one is there a second time, under the bare name.
        return f"hf-hub:{ORGANISATION}", f"{ORGANISATION} on the Hub", list(dict.fromkeys(tags))
    if folder.is_dir():
        root, place = f"local-dir:{folder}", f"the folder {hub} (TIMM_SUGAR_HUB)"
        names = [path.parent.name for path in folder.glob(f"{variant}.*/config.json")]
    elif re.fullmatch(r"[\w-][\w.-]*", hub):
        root, place = f"hf-hub:{hub}", f"the organisation {hub} on the Hub (TIMM_SUGAR_HUB)"
        try:
            found = HfApi().list_models(author=hub, search=f"{variant}.")  # which has patience itself
            names = [model.id.partition("/")[2] for model in found]
        except (OfflineModeIsEnabled, HfHubHTTPError, httpx.HTTPError) as error:
            if isinstance(error, HfHubHTTPError):
                refuse_bad_token(error)
            place += ", which cannot be reached, so that the cache was looked into"
            cache = Path(cache_dir or constants.HF_HUB_CACHE)
            names = [path.name.rpartition("--")[2] for path in cache.glob(f"models--{hub}--{variant}.*")]
    else:
        raise RuntimeError(f"TIMM_SUGAR_HUB={hub} is neither an existing folder nor an organisation of the Hub")
    return root, place, sorted(name.removeprefix(f"{variant}.") for name in names if name.startswith(f"{variant}."))


def read_config(source: str, cache_dir: str | None = None, weights: bool = True) -> PublishedConfig:
    """Read the config.json of a published model, and believe of it only what describes a model of timm's registry.

    Args:
        source: ``hf-hub:ORG/NAME``, with or without ``@REVISION``, or ``local-dir:FOLDER``.
        cache_dir: In place of huggingface_hub's cache.
        weights: Make sure that there are weights too, as safetensors, and that they are what the Hub says.

    Raises:
        ValueError: the file is no model's config.json, names an unregistered model, or asks for more than a model.
        OSError: there is no such repository or folder, or a file of it is missing or corrupted.
    """
    kind, _, model_id = source.partition(":")
    wanted = ["config.json", WEIGHTS] if weights else ["config.json"]
    if kind == "hf-hub":
        repo_id, _, revision = model_id.partition("@")
        paths = [download(repo_id, name, revision or None, cache_dir) for name in wanted]
        where = {"hf_hub_id": model_id, "hf_hub_filename": WEIGHTS, "source": "hf-hub"}
    else:
        paths = [Path(model_id, name) for name in wanted]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{model_id} is no published model: it has no {path.name}")
        where = {"file": model_id, "source": "local-dir"}
    try:
        config = json.loads(paths[0].read_text(encoding="utf-8"))
        record = config.get("timm_sugar")
        cfg, architecture, model_args = parse_model_config(config)
        architecture, activation = _read_record(record, architecture, model_args)
        if not is_model(architecture):
            raise ValueError(f"it names {architecture!r}, which is no model of timm's registry")
        refused = sorted(_NOT_MODEL_ARGUMENTS & model_args.keys())
        if refused:
            raise ValueError(f"its model_args hold {', '.join(refused)}, which are not arguments of a model")
        fields = {field.name for field in dataclasses.fields(PretrainedCfg)} - _SOURCES
        cfg = {key: value for key, value in cfg.items() if key in fields} | where
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"config.json of {model_id} cannot be used: {reason}") from error
    others = {key: value for key, value in model_args.items() if key not in _ACTIVATION}
    return PublishedConfig(source, architecture, record is not None, activation, others, cfg)


def _read_record(record: Any, architecture: str, model_args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    given = {key: model_args[key] for key in _ACTIVATION if model_args.get(key) is not None}
    if record is not None:
        architecture = record["architecture"]
        recorded = {key: record[key] for key in ("surrogate", "alpha") if record.get(key) is not None}
        # Where there is a surrogate, act_layer is the plain ReLU that stands in for it elsewhere.
        plain = {"act_layer": record.get("act_layer", given.get("act_layer")), "alpha": given.get("alpha")}
        plain = {key: value for key, value in plain.items() if value is not None}
        given = recorded or (plain if "act_layer" in plain else {})
    kinds: dict[str, Any] = {"surrogate": str, "alpha": (int, float), "act_layer": str}
    for key, value in given.items():
        if not isinstance(value, kinds[key]):
            raise ValueError(f"{key} is {value!r}")
    if not isinstance(architecture, str):
        raise ValueError(f"architecture is {architecture!r}")
    return architecture, given
