"""The private parts of timm that we use, each with its reason, so that a change in timm breaks only this file."""

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

from timm.data.auto_augment import AugmentOp
from timm.layers import create_act
from timm.models import vgg
from timm.models._features import feature_take_indices as feature_take_indices  # for forward_intermediates
from timm.models._hub import _parse_model_cfg
from timm.models._hub import save_config_for_hf as save_config_for_hf  # the config.json that timm itself would write
from torch import Tensor, nn

# timm has no public way to add an activation; its factories fall back to these two tables.
ACT_LAYERS: MutableMapping[str, Any] = create_act._ACT_LAYER_DEFAULT
ACT_FUNCTIONS: MutableMapping[str, Any] = create_act._ACT_FN_DEFAULT


def parse_model_config(config: dict[str, Any]) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Read a config.json as timm does: pretrained_cfg, architecture, model_args. timm's public loader takes no dict."""
    cfg, architecture, model_args = _parse_model_cfg(config, {})
    return cfg, architecture, model_args


def convert_vgg_checkpoint(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename torchvision's layers of VGG to timm's, as timm's own entrypoints do; for other families this is public."""
    converted: dict[str, Tensor] = vgg._filter_fn(state_dict)
    return converted


def model_args(model: nn.Module) -> dict[str, Any] | None:
    """Return the arguments that timm's factory keeps on a model for its config.json; None if it was built otherwise."""
    found: dict[str, Any] | None = getattr(model, "_model_args", None)
    return found


def set_model_args(model: Any, arguments: dict[str, Any]) -> None:
    """Replace the arguments from which a saved model is rebuilt."""
    model._model_args = arguments


def shift_milestones(scheduler: Any) -> None:
    """Make a per-update multistep schedule decay at its milestones instead of one update early.

    timm looks one step ahead, which is correct for per-epoch schedules only.
    """
    scheduler.decay_t = [update + 1 for update in scheduler.decay_t]


def replace_augmentation(parts: Iterable[Any], old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Replace the function of an augmentation op in `parts`, but not in timm's tables, which are global."""
    for op in augment_ops(parts):
        if op.aug_fn is old:
            op.aug_fn = new


def augment_ops(parts: Iterable[Any]) -> Iterator[AugmentOp]:
    """Yield the operations in the parts of a transform."""
    for part in parts:
        if isinstance(part, AugmentOp):
            yield part
        elif isinstance(part, (list, tuple)):
            yield from augment_ops(part)
        else:  # RandAugment and AugMixAugment have `ops`; AutoAugment has `policy`, a list of lists of ops
            yield from augment_ops([getattr(part, name) for name in ("ops", "policy") if hasattr(part, name)])
