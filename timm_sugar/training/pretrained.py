"""The initial weights of a run: finding them, reading their image settings, loading and freezing them."""

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MethodType
from typing import Any

import timm
from huggingface_hub import try_to_load_from_cache
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, load_state_dict, split_model_name_tag
from torch import Tensor, nn

from ..convert import SugarReport
from ..data import listed
from ..hub import find_model
from ..layers import Activation
from ..models import build, is_own
from ..models._weights import find_weights, read_config
from ..settings import TrainConfig, all_settings
from ..surrogates import unknown_name
from .checkpoint import checkpoint_to_resume, is_complete, read_state
from .folder import read_record
from .processes import from_main_process, process_state


@dataclass(frozen=True)
class Initial:
    """The initial weights of a run and their network."""

    source: str  # of the weights, including the commit if they are from the Hub
    architecture: str  # of the network to train, by name in timm's registry
    activation: Activation  # default activation if the settings do not give one
    model_args: dict[str, Any]  # other arguments of the network, without img_size and num_classes
    labels: Sequence[str] = ()  # class names of the weights' classifier, () if unknown
    classifier: Sequence[str] = ()  # names of the modules that form the classifier
    tensors: dict[str, Tensor] | None = None  # None if the run resumes from a checkpoint

    @property
    def record(self) -> dict[str, Any]:
        """The entry in config.yaml, from which a resumed run builds the network again."""
        arguments = {"activation": self.activation.given(), "model_args": self.model_args}
        return {"source": self.source, "architecture": self.architecture, **arguments}


# Settings with defaults from the weights.
_SAID = ("model", "img_size", "interpolation", "crop_pct", "mean", "std")
_OF_NETWORK = (
    "input_size", "fixed_input_size", "pool_size", "interpolation", "crop_pct", "mean", "std",
    "num_classes", "first_conv", "classifier",
)  # fmt: skip


def find_initial(config: TrainConfig) -> tuple[TrainConfig, Initial | None]:
    """Return the settings, with open ones filled in from the weights, and the initial weights, None without any."""
    if config.pretrained is None and config.initial_checkpoint is None:
        return config, None
    before = from_main_process(_recorded, config)
    if before is not None and "weights" in before:
        found = dict(before["weights"])
        found["activation"] = Activation(**found["activation"])
        return _fill(config, before), Initial(**found)
    try:
        cfg, initial = _locate(config)
        _, height, width = cfg["input_size"]
        if config.img_size is None and height != width:
            raise ValueError(f"they are of images of {height, width} pixels, which are not square; give img_size")
        filled = _fill(config, cfg | {"model": initial.architecture, "img_size": width})
        return filled, _load(filled, initial, cfg)
    except Exception as error:  # timm, huggingface_hub, torch and HTTP clients raise many types
        source = config.pretrained or config.initial_checkpoint
        reason = " ".join(str(error).split()) or type(error).__name__
        if "loading state_dict" in reason:  # torch's message lists every tensor
            missing = reason.partition(": ")[2]
            reason = f"it does not hold the weights of {config.model or 'its model'}: {missing[:200]} ..."
        raise ValueError(f"cannot start from {source}: {reason}") from error


def _recorded(config: TrainConfig) -> dict[str, Any] | None:
    """Return the settings of the run to resume or evaluate; None for a new run."""
    if config.output is None:
        return None
    path = checkpoint_to_resume(config.folder / "checkpoints", config.resume)
    if path is not None:
        return read_state(path).settings if is_complete(path) else None
    return read_record(config.folder) if config.eval_only else None


def _fill(config: TrainConfig, said: dict[str, Any]) -> TrainConfig:
    known = {name: said.get(name) or all_settings()[name].otherwise for name in _SAID}
    return dataclasses.replace(config, **{k: v for k, v in known.items() if getattr(config, k) is None})


def _locate(config: TrainConfig) -> tuple[dict[str, Any], Initial]:
    """Return timm's pretrained_cfg of the weights, and an `Initial` without tensors."""
    if config.initial_checkpoint is not None:
        return _file(config)
    given = str(config.pretrained)
    source = given if given.startswith(("hf-hub:", "local-dir:")) else find_model(given).source
    name, tag = split_model_name_tag(source)
    if ":" not in source and not is_own(name):
        cfg = _of_timm(source)
        return cfg, Initial(f"{name}.{cfg['tag']}" if cfg.get("tag") else name, name, Activation(), {})
    found = read_config(source if ":" in source else find_weights(name, tag or None))
    cfg = _registered(found.architecture) | found.pretrained_cfg  # a folder may omit the defaults of its architecture
    cfg["fixed_input_size"] |= "img_size" in found.model_args  # only networks with a fixed size have this argument
    place = f"hf-hub:{cfg['hf_hub_id']}" if cfg["source"] == "hf-hub" else found.source
    place = place if ":" in source else Path(found.source).name.partition("@")[0]
    arguments = {key: value for key, value in found.model_args.items() if key not in ("img_size", "num_classes")}
    return cfg, Initial(place, found.architecture, found.activation, arguments)


def _registered(architecture: str) -> dict[str, Any]:
    """Return the values of timm's registry for an architecture and its images that do not depend on the weights."""
    found = timm.get_pretrained_cfg(architecture)
    return {} if found is None else {name: getattr(found, name) for name in _OF_NETWORK}


def _of_timm(name: str) -> dict[str, Any]:
    """Return timm's pretrained_cfg of one of its models, or raise ValueError if the tag or the weights do not exist."""
    cfgs = get_arch_pretrained_cfgs(name)
    having = [known for known, cfg in cfgs.items() if cfg.has_weights]
    wanted = timm.get_pretrained_cfg(name) if "." not in name or name in cfgs else None
    if wanted is None or not wanted.has_weights:
        exist = f"there are {listed(having)}" if having else f"there are none of {name.partition('.')[0]}"
        raise ValueError(f"timm has no weights of this name; {exist}")
    return dict(wanted.to_dict())


def _file(config: TrainConfig) -> tuple[dict[str, Any], Initial]:
    """As `_locate` for a file of weights; image settings are the defaults of the architecture."""
    path = Path(str(config.initial_checkpoint))
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    try:
        tensors = load_state_dict(str(path))
    except Exception as error:  # pickle, safetensors, zipfile and torch raise different types
        raise ValueError("it is no file of safetensors, nor of tensors alone that torch.save wrote") from error
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError("it holds more than tensors, and neither a state_dict nor a model among it")
    cfg = _registered(config.model)
    weight = tensors.get(f"{_classifiers(cfg)[0]}.weight") if _classifiers(cfg) else None
    cfg |= {"state_dict": tensors, "num_classes": cfg.get("num_classes", 0) if weight is None else len(weight)}
    return cfg, Initial(path.name, config.model, Activation(), {})


def _classifiers(cfg: dict[str, Any]) -> tuple[str, ...]:
    found = cfg.get("classifier") or ()
    return (found,) if isinstance(found, str) else tuple(found)


def _load(config: TrainConfig, initial: Initial, cfg: dict[str, Any]) -> Initial:
    """Return `initial` with its tensors for the run's image size, loaded by timm into the original network."""
    own = initial.architecture == config.model
    size = {"img_size": config.img_size} if cfg.get("fixed_input_size") else {}
    arguments = size | initial.model_args | (config.model_args if own else {})
    arguments |= {"num_classes": cfg["num_classes"]} | initial.activation.given()
    try:
        network = build(initial.architecture, pretrained=True, pretrained_cfg=cfg, **arguments)
    except OSError as error:
        cached = [tag for tag, known in get_arch_pretrained_cfgs(initial.architecture).items() if _is_cached(known)]
        here = f"on this machine are {listed(cached)}" if cached else "none of its tags is on this machine"
        raise ValueError(f"{' '.join(str(error).split()).rstrip('.')}; {here}") from error
    return dataclasses.replace(
        initial,
        architecture=config.model,
        activation=initial.activation if own else Activation(),
        labels=tuple(cfg.get("label_names") or ()),
        classifier=_classifiers(cfg),
        tensors=network.state_dict(),
    )


def start_from(initial: Initial | None, network: nn.Module, config: TrainConfig, class_names: Sequence[str]) -> None:
    """Load the initial weights into the network, freeze parameters, and report both on standard error."""
    notes = [
        _describe_conversion(network, config.model),
        _load_initial(network, initial, class_names),
        freeze(network, config.freeze),
    ]
    for note in filter(None, notes if process_state().is_main_process else []):
        print(note, file=sys.stderr)


def _is_cached(cfg: PretrainedCfg) -> bool:
    files = ("model.safetensors", "pytorch_model.bin")
    repo = cfg.hf_hub_id
    return bool(repo) and any(isinstance(try_to_load_from_cache(str(repo), name), str) for name in files)


def _load_initial(network: nn.Module, initial: Initial | None, class_names: Sequence[str]) -> str | None:
    """Load the weights and return a log line; the classifier is not loaded unless its classes are the same."""
    if initial is None or initial.tensors is None:
        return None
    own = network.state_dict()
    head = [name for name in own if name.rpartition(".")[0] in initial.classifier]
    fits = all(name in initial.tensors and initial.tensors[name].shape == own[name].shape for name in head)
    keep = fits and list(initial.labels or class_names) == list(class_names)
    loaded = {k: v for k, v in initial.tensors.items() if keep or k.rpartition(".")[0] not in initial.classifier}
    wanted = {name: value for name, value in own.items() if keep or name not in head}
    problems = {
        "missing": [name for name in wanted if name not in loaded],
        "unexpected": [name for name in loaded if name not in wanted],
        "of another shape": [name for name in wanted if name in loaded and loaded[name].shape != wanted[name].shape],
    }
    found = [f"{len(names)} {what} (such as {names[0]!r})" for what, names in problems.items() if names]
    if found:
        raise ValueError(
            f"the weights of {initial.source} are not those of {initial.architecture}; tensors {', '.join(found)}"
        )
    network.load_state_dict(loaded, strict=False)
    kept = "their classifier kept" if keep else f"with a new classifier of {len(class_names)} classes"
    return f"{initial.architecture} starts from the weights of {initial.source}, {kept}"


def _describe_conversion(network: nn.Module, architecture: str) -> str | None:
    """Return a log line about the changes by `convert`; None if the network was not converted."""
    report: SugarReport | None = getattr(network, "sugar_report", None)
    if report is None:
        return None
    counts = Counter(report.converted.values())
    was = ", ".join(f"{count} {name}" for name, count in counts.items())
    line = f"{architecture}: SUGAR {report.surrogate}, alpha {report.alpha}, in place of {was}"
    others = sorted({name for name in counts if name.lower() not in ("relu", "sugar")})
    if others:
        line += f"; with {', '.join(others)} gone it is a ReLU network, so its outputs differ before it is trained"
    if report.gates:
        line += f"; {len(report.gates)} left alone as part of a gate"
    return line


def freeze(network: nn.Module, patterns: Sequence[str]) -> str | None:
    """Freeze parameters whose names, or whose modules' names, match fnmatch patterns, and return a log line.

    A BatchNorm whose parameters are all frozen uses its running statistics in training too, as at inference. With
    batch statistics, the next layers would be trained on different inputs than they are evaluated on.

    Raises:
        ValueError: a pattern matches nothing, or no parameter is left to train.
    """
    if not patterns:
        return None
    parameters = dict(network.named_parameters())
    for pattern in patterns:
        matched = [name for name in parameters if _matches(name, pattern)]
        if not matched:
            names = [name for name, _ in network.named_modules() if name]
            raise ValueError(unknown_name("part of the network to freeze:", pattern, [*names, *parameters]))
        for name in matched:
            parameters[name].requires_grad_(False)
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    if not trained:
        raise ValueError(f"freeze {' '.join(patterns)} leaves nothing to train")
    held = 0
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            own = list(module.parameters(recurse=False))
            named = any(_matches(f"{name}.running_mean", pattern) for pattern in patterns)
            if (own and not any(p.requires_grad for p in own)) or (not own and named):
                vars(module)["train"] = MethodType(_stay_in_eval, module)  # a bound method is copied with the network
                module.eval()
                held += 1
    total = sum(p.numel() for p in parameters.values())
    line = f"frozen: {', '.join(_topmost(network, parameters))}; {trained:,} of {total:,} parameters are trained"
    return line + (f", {held} BatchNorm layers keep their statistics" if held else "")


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)


def _topmost(network: nn.Module, parameters: dict[str, nn.Parameter]) -> list[str]:
    """Return the names of the topmost modules, and of other parameters, that are completely frozen."""
    found: list[str] = []
    for name, part in (*network.named_modules(), *parameters.items()):  # parents come before children
        own = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
        if own and not any(p.requires_grad for p in own) and not any(name.startswith(f"{whole}.") for whole in found):
            found.append(name)
    return found
