"""Shared by all registered models: default_cfgs, construction, and loading of published weights."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    parse_model_name,
    register_model,
    split_model_name_tag,
)
from torch import Tensor, nn

from .._timm import set_model_args
from ..activations import activation_kinds
from ..convert import NOT_RECORDED, convert, is_own, keep_record
from ..layers import Activation
from ._download import cache_alone_out_of_reach
from ._weights import WEIGHTS, read_config, read_published

ModelT = TypeVar("ModelT", bound=nn.Module)
EntrypointT = TypeVar("EntrypointT", bound=Callable[..., nn.Module])

IMAGENET_INPUT = dict(
    num_classes=1000,
    input_size=(3, 224, 224),
    pool_size=(7, 7),
    crop_pct=0.875,
    interpolation="bicubic",
    mean=IMAGENET_DEFAULT_MEAN,
    std=IMAGENET_DEFAULT_STD,
)
# Input of the networks for CIFAR; mean and std of CIFAR-10's training pixels (Krizhevsky, 2009).
CIFAR_INPUT = dict(
    num_classes=10,
    input_size=(3, 32, 32),
    crop_pct=1.0,
    interpolation="bicubic",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)


def cfg(**kwargs: Any) -> dict[str, Any]:
    """Return a default_cfg with the fields that all models share. Weights are safetensors, never a pickled .bin.

    To publish weights, add ``"ARCHITECTURE.TAG"`` to `default_cfgs`, with their input and ``hf_hub_id``, before the
    entry without weights, and rename the latter to ``"ARCHITECTURE.*"``, timm's mark for the default entry.
    """
    return {
        "hf_hub_filename": WEIGHTS,
        "license": "apache-2.0",
        "paper_ids": "arXiv:2505.22074",
        "paper_name": "The Resurrection of the ReLU",
        "origin_url": "https://arxiv.org/abs/2505.22074",
        **kwargs,
    }


@dataclass(frozen=True)
class Variant:
    """Properties that an entrypoint declares for its network.

    Attributes:
        activation: Default surrogate and alpha; None if it has another activation.
        stock: timm's equivalent network at inference, with the same weights; None if timm has none.
        stock_args: Arguments that give `stock` the same initial weights.
    """

    activation: Activation | None
    stock: str | None
    stock_args: dict[str, Any]


_VARIANTS: dict[str, Variant] = {}


def register_variant(
    activation: Activation | None = None, stock: str | None = None, **stock_args: Any
) -> Callable[[EntrypointT], EntrypointT]:
    """Register an entrypoint with timm, with the properties of `Variant`."""

    def register(entrypoint: EntrypointT) -> EntrypointT:
        _VARIANTS[entrypoint.__name__] = Variant(activation, stock, stock_args)
        register_model(entrypoint)
        return entrypoint

    return register


def build_variant(
    model_cls: type[ModelT],
    variant: str,
    pretrained: bool,
    filter_fn: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None,
    **kwargs: Any,
) -> ModelT:
    """`timm.models.build_model_with_cfg` with our activation arguments, and with a check of the weights.

    Args:
        model_cls: Class of the model; its constructor takes act_layer, a callable.
        variant: Name of the entrypoint.
        pretrained: Load the weights.
        filter_fn: timm's function that converts other checkpoint formats of this family.
        kwargs: Arguments of timm's function, and the fields of `timm_sugar.layers.Activation`.

    Raises:
        ValueError: as `Activation.resolve`.
        RuntimeError: there are no weights, they belong to another architecture, or `num_classes` is not given and
            they have another number of classes.
    """
    activation = Activation.pop(kwargs)
    if pretrained and not _has_source(kwargs):
        found = read_published(variant, kwargs.get("pretrained_cfg"), kwargs.get("cache_dir"))
        kwargs["pretrained_cfg"] = found.pretrained_cfg
        if activation.surrogate is None and activation.alpha is None and activation.act_layer is None:
            activation = replace(found.activation, save=activation.save or found.activation.save)
    layer = activation.resolve(_VARIANTS[variant].activation).layer()
    if layer is not None:
        kwargs["act_layer"] = layer

    def checked(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        state_dict = dict(filter_fn(state_dict, model) if filter_fn else state_dict)
        _check_weights(state_dict, model, variant)
        _keep_classifier(state_dict, model, 0 if kwargs.get("features_only") else kwargs.get("num_classes"))
        return state_dict

    model: Any = build_model_with_cfg(model_cls, variant, pretrained, pretrained_filter_fn=checked, **kwargs)
    set_model_args(model, activation.given())  # so that a saved model is rebuilt with them
    keep_record(model, activation.given())
    built: ModelT = model
    return built


def _has_source(kwargs: dict[str, Any]) -> bool:
    """Whether the caller gives the location of the weights, instead of a tag."""
    if isinstance(kwargs.get("pretrained_cfg"), (dict, PretrainedCfg)):
        return True
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    return any(overlay.get(key) for key in ("state_dict", "file", "url", "hf_hub_id"))


def _check_weights(state_dict: dict[str, Tensor], model: Any, variant: str) -> None:
    """Raise a one-line RuntimeError if the weights do not fit, apart from the classifier and the input channels."""
    free = model.pretrained_cfg["first_conv"], model.pretrained_cfg["classifier"]
    expected = {k: v.shape for k, v in model.state_dict().items() if k.rpartition(".")[0] not in free}
    given = {k: v.shape for k, v in state_dict.items() if k.rpartition(".")[0] not in free}
    conv = f"{free[0]}.weight"  # timm adapts only its input channels
    if conv in state_dict:
        expected[conv], given[conv] = (v[conv].shape[:1] + v[conv].shape[2:] for v in (model.state_dict(), state_dict))
    problems = {
        "missing": [k for k in expected if k not in given],
        "unexpected": [k for k in given if k not in expected],
        "of another shape": [k for k in expected if k in given and given[k] != expected[k]],
    }
    found = [f"{len(keys)} {what} (such as {keys[0]!r})" for what, keys in problems.items() if keys]
    if found:
        raise RuntimeError(f"these weights are not those of {variant}; tensors {', '.join(found)}")


def _keep_classifier(state_dict: dict[str, Tensor], model: Any, num_classes: int | None) -> None:
    """Make timm load the classifier of a file if it fits, even if another number of classes is registered.

    Raises:
        RuntimeError: it does not fit, and `num_classes` was not given.
    """
    weight = state_dict.get(f"{model.pretrained_cfg['classifier']}.weight")
    if weight is None:
        return
    if num_classes is None and len(weight) != model.num_classes > 0:
        raise RuntimeError(
            f"these weights have {len(weight)} classes, and the network {model.num_classes}; num_classes={len(weight)} "
            f"keeps their classifier, num_classes={model.num_classes} starts a new one"
        )
    model.pretrained_cfg["num_classes"] = len(weight)


def create_model(model_name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, which for a published model also restores the surrogate that it was trained with.

    A published folder names timm's stock architecture if there is one, since at inference a SUGAR network is a plain
    ReLU network; `timm.create_model` builds this one. This function builds the architecture and surrogate recorded
    under ``"timm_sugar"`` in its config.json instead, so that fine-tuning uses SUGAR.

    Args:
        model_name: A model of timm's registry, ``hf-hub:ORG/NAME`` or ``local-dir:FOLDER``.
        pretrained: Load the weights.
        kwargs: As for `timm.create_model`; they override the recorded values.

    Raises:
        ValueError: unknown surrogate, one that contradicts act_layer, or an invalid config.json.
        OSError: the repository or folder does not exist, or one of its files is missing or corrupted.
        RuntimeError: unknown architecture.

    Examples:
        >>> model = create_model("resnet18_cifar_sugar_bsilu", alpha=1.0).eval()
        >>> model(torch.zeros(2, 3, 32, 32)).shape  # (N, 3, H, W) -> (N, classes)
        torch.Size([2, 10])
        >>> model = create_model("local-dir:output/digits/model", pretrained=True)  # doctest: +SKIP
    """
    source, model_id = parse_model_name(model_name)
    if source is None:
        return build(model_name, pretrained=pretrained, **kwargs)
    found = read_config(f"{source}:{model_id}", kwargs.get("cache_dir"), weights=pretrained)
    wanted, recorded = Activation.pop(kwargs), found.activation
    if wanted.act_layer is not None:
        recorded = Activation()
    elif wanted.surrogate is not None:  # with its own default alpha
        recorded = Activation(save=recorded.save)
    arguments = {**found.model_args, **recorded.given(), **wanted.given(), **kwargs}
    saved: dict[str, Any] = dict(pretrained_cfg=found.pretrained_cfg, pretrained_model_args=found.model_args)
    model: Any = build(found.architecture, pretrained=pretrained, **saved, **arguments)
    if model.pretrained_cfg.pop("state_dict", None) is not None:
        model.pretrained_cfg["source"] = source
    if found.of_transformers and wanted == Activation() and (kinds := activation_kinds(model)) != ["relu"]:
        warnings.warn(
            f"config.json of {model_id} records no conversion, so that this {found.architecture} has "
            f"{' and '.join(kinds)}, as timm builds it; if it was converted, give surrogate=",
            stacklevel=2,
        )
    built: nn.Module = model
    return built


def build(architecture: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model` with `surrogate`, `alpha` and `save` for stock architectures too, by conversion.

    Raises:
        ValueError: alpha or save without a surrogate, or a surrogate with act_layer.
    """
    if is_own(architecture):
        return timm.create_model(architecture, **kwargs)
    activation = Activation.pop(kwargs)
    resolved = activation.resolve()
    if activation.act_layer is not None:
        kwargs["act_layer"] = activation.act_layer if resolved.alpha is None else resolved.layer()
    cfg = kwargs.get("pretrained_cfg")
    local = isinstance(cfg, dict) and ("file" in cfg or "state_dict" in cfg)
    with cache_alone_out_of_reach() if kwargs.get("pretrained") and not local else nullcontext():
        model = timm.create_model(architecture, **kwargs)
    if resolved.surrogate is None:
        return model
    with warnings.catch_warnings():  # callers record the surrogate next to the weights
        warnings.filterwarnings("ignore", message=NOT_RECORDED)
        return convert(model, resolved.surrogate, resolved.alpha, resolved.save or "exact")


def stock_architecture(architecture: str) -> str | None:
    """Return the timm architecture with the same weights that is equivalent at inference.

    Args:
        architecture: A registered model. For models that are not ours, the result is the same name.

    Returns:
        ``"resnet18"`` for ``"resnet18_sugar_bsilu"``; None if timm has none. timm's Swin has the same weights, but
        GELU instead of ReLU, so it does not count.
    """
    name = split_model_name_tag(architecture)[0]
    if not is_own(name):
        return name
    return _VARIANTS[name].stock


def size_arguments(name: str, img_size: int) -> dict[str, int]:
    """Return the extra arguments of `timm.create_model` to build `name` for square images of `img_size` pixels."""
    cfg = timm.get_pretrained_cfg(name)
    fixed = cfg is not None and cfg.fixed_input_size and cfg.input_size[-1] != img_size
    return {"img_size": img_size} if fixed else {}
