"""ResNets with SUGAR: timm's, and the usual network for CIFAR.

Source: He et al., "Deep Residual Learning", arXiv:1512.03385, as in timm; Horuz et al., arXiv:2505.22074, section 4.1.
"""

from typing import Any

from timm.models import generate_default_cfgs
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from ..layers import Activation
from ._pretrained import CIFAR_INPUT, IMAGENET_INPUT, build_variant, cfg, register_variant

__all__ = ["CifarResNet"]

_BSILU = Activation("bsilu")


class CifarResNet(ResNet):
    """ResNet for 32 x 32 images: a 3x3 stride-1 stem without max-pooling, so every stage has 4 times timm's resolution.

    Takes timm's ResNet arguments; `output_stride` is counted as if the stem had stride 4. The stem is always
    the plain one: `stem_type`, `stem_width`, `replace_stem_pool` and `aa_layer` raise an error.
    """

    def __init__(self, *args: Any, in_chans: int = 3, zero_init_last: bool = True, **kwargs: Any):
        refused = sorted(kwargs.keys() & {"stem_type", "stem_width", "replace_stem_pool", "aa_layer"})
        if refused:
            raise ValueError(f"the CIFAR stem is a plain 3x3 convolution: {', '.join(refused)} cannot be given")
        super().__init__(*args, **dict(kwargs, in_chans=in_chans, zero_init_last=zero_init_last))
        stem: Any = self.conv1
        device, dtype = stem.weight.device, stem.weight.dtype
        conv: Any = nn.Conv2d(in_chans, 64, 3, stride=1, padding=1, bias=False, device=device, dtype=dtype)
        no_pooling: Any = nn.Identity()
        self.conv1, self.maxpool = conv, no_pooling
        info: list[dict[str, Any]] = self.feature_info
        self.feature_info = [dict(stage, reduction=max(1, stage["reduction"] // 4)) for stage in info]
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def _create_resnet(variant: str, pretrained: bool, model_cls: type[ResNet] = ResNet, **kwargs: Any) -> ResNet:
    # timm starts each residual branch at zero; at the paper's learning rate of 0.001 such a network barely learns.
    kwargs.setdefault("zero_init_last", False)
    return build_variant(model_cls, variant, pretrained, **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return cfg(**IMAGENET_INPUT | dict(first_conv="conv1", classifier="fc") | kwargs)


# With the statistics that the published weights were trained with: those of the JPEG re-encoding.
_CIFAR10_INPUT = CIFAR_INPUT | dict(mean=(0.4914, 0.4822, 0.4466), std=(0.2452, 0.2429, 0.2607))

default_cfgs = generate_default_cfgs(
    {
        "resnet18_sugar_bsilu.cifar10": _cfg(
            hf_hub_id="timm-sugar/resnet18_sugar_bsilu.cifar10", **_CIFAR10_INPUT, pool_size=(1, 1)
        ),
        "resnet18_sugar_bsilu.*": _cfg(),
        "resnet34_sugar_bsilu": _cfg(),
        "resnet50_sugar_bsilu": _cfg(),
        "resnet18_cifar_sugar_bsilu.cifar10": _cfg(
            hf_hub_id="timm-sugar/resnet18_cifar_sugar_bsilu.cifar10", **_CIFAR10_INPUT, pool_size=(4, 4)
        ),
        "resnet18_cifar_sugar_bsilu.*": _cfg(**CIFAR_INPUT, pool_size=(4, 4)),
    }
)


@register_variant(_BSILU, stock="resnet18", zero_init_last=False)
def resnet18_sugar_bsilu(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """timm's ResNet-18 with SUGAR B-SiLU (arXiv:2505.22074)."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return _create_resnet("resnet18_sugar_bsilu", pretrained, **dict(model_args, **kwargs))


@register_variant(_BSILU, stock="resnet34", zero_init_last=False)
def resnet34_sugar_bsilu(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """timm's ResNet-34 with SUGAR B-SiLU (arXiv:2505.22074)."""
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3))
    return _create_resnet("resnet34_sugar_bsilu", pretrained, **dict(model_args, **kwargs))


@register_variant(_BSILU, stock="resnet50", zero_init_last=False)
def resnet50_sugar_bsilu(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """timm's ResNet-50 with SUGAR B-SiLU (arXiv:2505.22074)."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return _create_resnet("resnet50_sugar_bsilu", pretrained, **dict(model_args, **kwargs))


@register_variant(_BSILU)
def resnet18_cifar_sugar_bsilu(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 for CIFAR with SUGAR B-SiLU (arXiv:2505.22074, section 4.1): 3x3 stem, no max-pooling.

    The paper does not state its stem; this is the usual one for 32 x 32 images.
    """
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2), model_cls=CifarResNet)
    return _create_resnet("resnet18_cifar_sugar_bsilu", pretrained, **dict(model_args, **kwargs))
