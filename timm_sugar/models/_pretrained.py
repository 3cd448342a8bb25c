"""What every registered model shares: default_cfgs, construction, and the loading of published weights."""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerType
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    is_model,
    parse_model_name,
    split_model_name_tag,
)
from torch import Tensor, nn

from .._timm import set_model_args
from ..convert import NOT_RECORDED, convert, is_own, keep_record
from ..layers import sugar_act_layer
from ._weights import WEIGHTS, read_config, read_published

ModelT = TypeVar("ModelT", bound=nn.Module)

IMAGENET_INPUT = dict(
    num_classes=1000,
    input_size=(3, 224, 224),
    pool_size=(7, 7),
    crop_pct=0.875,
    interpolation="bicubic",
    mean=IMAGENET_DEFAULT_MEAN,
    std=IMAGENET_DEFAULT_STD,
)
# What the networks for CIFAR expect; the statistics are those of CIFAR-10's training pixels (Krizhevsky, 2009).
CIFAR_INPUT = dict(
    num_classes=10,
    input_size=(3, 32, 32),
    crop_pct=1.0,
    interpolation="bicubic",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)


def cfg(**kwargs: Any) -> dict[str, Any]:
    """Return a default_cfg with what all models here share. Weights are safetensors: never a pickled .bin.

    Published weights are one more line in `default_cfgs`, ``"ARCHITECTURE.TAG"``, with their input and ``hf_hub_id``,
    before the network by itself, which then is ``"ARCHITECTURE.*"``: so timm marks what the bare name stands for.
    """
    return {
        "hf_hub_filename": WEIGHTS,
        "license": "apache-2.0",
        "paper_ids": "arXiv:2505.22074",
        "paper_name": "The Resurrection of the ReLU",
        "origin_url": "https://arxiv.org/abs/2505.22074",
        **kwargs,
    }


def build_variant(
    model_cls: type[ModelT],
    variant: str,
    pretrained: bool,
    default: str | None,
    surrogate: str | None = None,
    alpha: float | None = None,
    act_layer: LayerType | None = None,
    save: str | None = None,
    default_alpha: float | None = None,
    filter_fn: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None,
    **kwargs: Any,
) -> ModelT:
    """`timm.models.build_model_with_cfg` with the activation arguments of all models here, and checked weights.

    Args:
        model_cls: Class of the model; its constructor takes act_layer, a callable.
        variant: Name of the entrypoint.
        pretrained: Load the weights.
        default, surrogate, alpha, act_layer, save, default_alpha: As `timm_sugar.layers.sugar_act_layer` takes them.
        filter_fn: timm's converter of checkpoints of this family in other formats.
        kwargs: As for timm's function.

    Raises:
        ValueError: as `sugar_act_layer`.
        RuntimeError: there are no weights, or they are those of another architecture, or of another number of classes
            than the network has without `num_classes`.
    """
    if pretrained and not _has_source(kwargs):
        found = read_published(variant, kwargs.get("pretrained_cfg"), kwargs.get("cache_dir"))
        kwargs["pretrained_cfg"] = found.pretrained_cfg
        if surrogate is None and alpha is None and act_layer is None:
            recorded = found.activation
            surrogate, alpha, act_layer = (recorded.get(key) for key in ("surrogate", "alpha", "act_layer"))
            save = save or recorded.get("save")
    layer = sugar_act_layer(default, surrogate, alpha, act_layer, save, default_alpha)
    if layer is not None:
        kwargs["act_layer"] = layer

    def checked(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        state_dict = dict(filter_fn(state_dict, model) if filter_fn else state_dict)
        _check_weights(state_dict, model, variant)
        _keep_classifier(state_dict, model, 0 if kwargs.get("features_only") else kwargs.get("num_classes"))
        return state_dict

    model: Any = build_model_with_cfg(model_cls, variant, pretrained, pretrained_filter_fn=checked, **kwargs)
    given = dict(surrogate=surrogate, alpha=alpha, act_layer=act_layer, save=save)
    given = {key: value for key, value in given.items() if value is not None}
    set_model_args(model, given)  # a saved model comes back with them
    keep_record(model, given)
    built: ModelT = model
    return built


def _has_source(kwargs: dict[str, Any]) -> bool:
    """Whether a caller says where the weights are, rather than by which tag they are published."""
    if isinstance(kwargs.get("pretrained_cfg"), (dict, PretrainedCfg)):
        return True
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    return any(overlay.get(key) for key in ("state_dict", "file", "url", "hf_hub_id"))


def _check_weights(state_dict: dict[str, Tensor], model: Any, variant: str) -> None:
    """Raise RuntimeError, in one line, where the weights do not fit in more than the classifier or the channels in."""
    free = model.pretrained_cfg["first_conv"], model.pretrained_cfg["classifier"]
    expected = {k: v.shape for k, v in model.state_dict().items() if k.rpartition(".")[0] not in free}
    given = {k: v.shape for k, v in state_dict.items() if k.rpartition(".")[0] not in free}
    conv = f"{free[0]}.weight"  # timm adapts its input channels, nothing else
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
    """Have timm load the classifier of a file wherever it fits, whatever number of classes is registered.

    Raises:
        RuntimeError: it does not fit, and nobody asked for another number of classes.
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

    A published folder names timm's stock architecture wherever there is one, since at inference a SUGAR network is a
    plain ReLU network; `timm.create_model` builds exactly that. Here the architecture and surrogate recorded under
    ``"timm_sugar"`` in its config.json are built instead, so that fine-tuning goes on with SUGAR.

    Args:
        model_name: A model of timm's registry, ``hf-hub:ORG/NAME`` or ``local-dir:FOLDER``.
        pretrained: Load the weights.
        kwargs: As for `timm.create_model`; they win over what the folder records.

    Raises:
        ValueError: unknown surrogate, one that contradicts act_layer, or a config.json that is not to be trusted.
        OSError: there is no such repository or folder, or a file of it is missing or corrupted.
        RuntimeError: unknown architecture.
    """
    source, model_id = parse_model_name(model_name)
    if source is None:
        return build(model_name, pretrained=pretrained, **kwargs)
    found = read_config(f"{source}:{model_id}", kwargs.get("cache_dir"), weights=pretrained)
    activation = found.activation
    if any(kwargs.get(key) is not None for key in ("surrogate", "act_layer")):
        # Another surrogate starts from its own default alpha.
        activation = {key: activation[key] for key in ("save",) if key in activation and not kwargs.get("act_layer")}
    arguments = {**found.model_args, **activation, **kwargs}
    saved: dict[str, Any] = dict(pretrained_cfg=found.pretrained_cfg, pretrained_model_args=found.model_args)
    return build(found.architecture, pretrained=pretrained, **saved, **arguments)


def build(
    architecture: str,
    surrogate: str | None = None,
    alpha: float | None = None,
    save: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """`timm.create_model` in which `surrogate`, `alpha` and `save` work for stock architectures too, by conversion.

    Raises:
        ValueError: alpha or save without a surrogate, or a surrogate with act_layer.
    """
    if is_own(architecture):
        return timm.create_model(architecture, surrogate=surrogate, alpha=alpha, save=save, **kwargs)
    sugar_act_layer(None, surrogate, alpha, kwargs.get("act_layer"), save)  # refuses what contradicts
    model = timm.create_model(architecture, **kwargs)
    if surrogate is None:
        return model
    with warnings.catch_warnings():  # whoever calls this keeps the surrogate next to the weights
        warnings.filterwarnings("ignore", message=NOT_RECORDED)
        return convert(model, surrogate, alpha, save or "exact")


def stock_architecture(architecture: str) -> str | None:
    """Return the timm architecture with the same weights and, at inference, the same function.

    Args:
        architecture: A model of the registry. For one that is not ours this is the name itself.

    Returns:
        ``"resnet18"`` for ``"resnet18_sugar_bsilu"``; None where timm has none. timm's Swin has the same weights, but
        GELU in place of ReLU, so it is not one.
    """
    name = split_model_name_tag(architecture)[0]
    if not is_own(name):
        return name
    stock = name.partition("_sugar_")[0]
    return stock if is_model(stock) and not is_own(stock) else None


def size_arguments(name: str, img_size: int) -> dict[str, int]:
    """Return what `timm.create_model` needs besides to build `name` for square images of `img_size` pixels."""
    cfg = timm.get_pretrained_cfg(name)
    fixed = cfg is not None and cfg.fixed_input_size and cfg.input_size[-1] != img_size
    return {"img_size": img_size} if fixed else {}
