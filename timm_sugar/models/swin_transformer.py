"""Swin Transformers with SUGAR: timm's, with an `act_layer` argument, which timm's class does not have.

Source: Liu et al., "Swin Transformer", arXiv:2103.14030, as in timm; Horuz et al., arXiv:2505.22074, section 4.2.
"""

from collections.abc import Callable
from typing import Any

from timm.models import generate_default_cfgs
from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn
from torch import nn

from ..layers import Activation
from ._pretrained import IMAGENET_INPUT, build_variant, cfg, register_variant

__all__ = ["SugarSwinTransformer"]

_NELU = Activation("nelu")  # no stock equivalent: timm's Swin has the same weights, but GELU instead of ReLU


class SugarSwinTransformer(SwinTransformer):
    """timm's Swin Transformer with an `act_layer` for the MLPs; every other argument is timm's."""

    def __init__(self, *args: Any, act_layer: Callable[[], nn.Module] = nn.GELU, **kwargs: Any):
        super().__init__(*args, **kwargs)
        stages: Any = self.layers
        for stage in stages:
            for block in stage.blocks:
                block.mlp.act = act_layer()


def _create_swin_transformer(variant: str, pretrained: bool, **kwargs: Any) -> SugarSwinTransformer:
    out_indices = kwargs.pop("out_indices", tuple(range(len(kwargs["depths"]))))
    return build_variant(
        SugarSwinTransformer,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(flatten_sequential=True, out_indices=out_indices),
        **kwargs,
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    names = dict(first_conv="patch_embed.proj", classifier="head.fc")
    return cfg(**IMAGENET_INPUT | names | dict(crop_pct=0.9, fixed_input_size=True) | kwargs)


default_cfgs = generate_default_cfgs(
    {
        "swin_tiny_sugar_nelu.tin_64": _cfg(
            hf_hub_id="timm-sugar/swin_tiny_sugar_nelu.tin_64",
            num_classes=200,
            input_size=(3, 64, 64),
            pool_size=(2, 2),
            crop_pct=1.0,
            mean=(0.4799, 0.4479, 0.3972),
            std=(0.2771, 0.2693, 0.2816),
        ),
        "swin_tiny_sugar_nelu.*": _cfg(),
        "swin_small_sugar_nelu": _cfg(),
        "swin_base_sugar_nelu": _cfg(),
    }
)


@register_variant(_NELU)
def swin_tiny_sugar_nelu(pretrained: bool = False, **kwargs: Any) -> SugarSwinTransformer:
    """timm's Swin-T, patch 4, window 7, 224 px, with SUGAR NeLU (arXiv:2505.22074, section 4.2)."""
    model_args = dict(patch_size=4, window_size=7, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
    return _create_swin_transformer("swin_tiny_sugar_nelu", pretrained, **dict(model_args, **kwargs))


@register_variant(_NELU)
def swin_small_sugar_nelu(pretrained: bool = False, **kwargs: Any) -> SugarSwinTransformer:
    """timm's Swin-S, patch 4, window 7, 224 px, with SUGAR NeLU (arXiv:2505.22074)."""
    model_args = dict(patch_size=4, window_size=7, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24))
    return _create_swin_transformer("swin_small_sugar_nelu", pretrained, **dict(model_args, **kwargs))


@register_variant(_NELU)
def swin_base_sugar_nelu(pretrained: bool = False, **kwargs: Any) -> SugarSwinTransformer:
    """timm's Swin-B, patch 4, window 7, 224 px, with SUGAR NeLU (arXiv:2505.22074)."""
    model_args = dict(patch_size=4, window_size=7, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
    return _create_swin_transformer("swin_base_sugar_nelu", pretrained, **dict(model_args, **kwargs))
