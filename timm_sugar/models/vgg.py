"""VGG-16 with SUGAR: timm's, with and without BatchNorm, and the usual network for CIFAR.

Source: Simonyan and Zisserman, arXiv:1409.1556, as in timm; Horuz et al., arXiv:2505.22074, section 4.1.
"""

from typing import Any

from timm.layers import ClassifierHead, LayerType, get_norm_layer
from timm.models import generate_default_cfgs
from timm.models.vgg import VGG, cfgs
from torch import nn

from .._timm import convert_vgg_checkpoint
from ..layers import Activation
from ._pretrained import CIFAR_INPUT, IMAGENET_INPUT, build_variant, cfg, register_variant

__all__ = ["CifarVGG"]

_BSILU = Activation("bsilu")


class CifarVGG(VGG):
    """VGG for 32 x 32 images: 13 convolutions with BatchNorm, average pooling and one linear layer.

    Takes timm's VGG arguments; `norm_layer` may also be a timm name, or "" for no normalisation (`timm.create_model`
    drops arguments that are None); `cfg` lists the channels of each convolution, and "M" for max-pooling. There is no
    hidden linear layer, so `mlp_ratio` raises an error.
    """

    def __init__(
        self,
        cfg: list[Any],
        num_classes: int = 10,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        norm_layer: LayerType | None = "batchnorm2d",
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ):
        if "mlp_ratio" in kwargs:
            raise ValueError("the CIFAR head is one linear layer: mlp_ratio cannot be given")
        norm: Any = get_norm_layer(norm_layer) if norm_layer else None
        # The base class builds two hidden layers of 4096 units, which are dropped here; one channel keeps them small.
        super().__init__(cfg, mlp_ratio=1 / 4096, norm_layer=norm, device=device, dtype=dtype, **kwargs)
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        pre_logits: Any = nn.Identity()
        self.pre_logits = pre_logits
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, device=device, dtype=dtype
        )
        self.head_hidden_size = self.head.num_features
        if num_classes > 0:
            nn.init.normal_(self.head.fc.weight, 0, 0.01)
            nn.init.zeros_(self.head.fc.bias)


def _create_vgg(variant: str, pretrained: bool, model_cls: type[VGG] = VGG, **kwargs: Any) -> VGG:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3, 4, 5))
    return build_variant(
        model_cls,
        variant,
        pretrained,
        filter_fn=lambda state_dict, model: convert_vgg_checkpoint(state_dict),
        model_cfg=kwargs.pop("cfg", cfgs["vgg16"]),
        feature_cfg=dict(flatten_sequential=True, out_indices=out_indices),
        **kwargs,
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return cfg(**IMAGENET_INPUT | dict(first_conv="features.0", classifier="head.fc") | kwargs)


default_cfgs = generate_default_cfgs(
    {
        "vgg16_sugar_bsilu": _cfg(),
        "vgg16_bn_sugar_bsilu": _cfg(),
        "vgg16_cifar_sugar_bsilu": _cfg(**CIFAR_INPUT, pool_size=(1, 1)),
    }
)


@register_variant(_BSILU, stock="vgg16")
def vgg16_sugar_bsilu(pretrained: bool = False, **kwargs: Any) -> VGG:
    """timm's VGG-16 with SUGAR B-SiLU (arXiv:2505.22074)."""
    return _create_vgg("vgg16_sugar_bsilu", pretrained, **kwargs)


@register_variant(_BSILU, stock="vgg16_bn")
def vgg16_bn_sugar_bsilu(pretrained: bool = False, **kwargs: Any) -> VGG:
    """timm's VGG-16 with BatchNorm and SUGAR B-SiLU (arXiv:2505.22074)."""
    return _create_vgg("vgg16_bn_sugar_bsilu", pretrained, **dict(dict(norm_layer=nn.BatchNorm2d), **kwargs))


@register_variant(_BSILU)
def vgg16_cifar_sugar_bsilu(pretrained: bool = False, **kwargs: Any) -> VGG:
    """VGG-16 for CIFAR with SUGAR B-SiLU (arXiv:2505.22074, section 4.1).

    BatchNorm and the single linear layer are our choice; the paper does not state them.
    """
    return _create_vgg("vgg16_cifar_sugar_bsilu", pretrained, model_cls=CifarVGG, **kwargs)
