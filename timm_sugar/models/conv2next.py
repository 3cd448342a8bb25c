"""Conv2NeXt, a ConvNeXt for small images: 3x3 convolutions at nearly full resolution and two mixed attentions.

Source: Feng et al., "Conv2NeXt: Reconsidering ConvNeXt Network Design for Image Recognition", CAIT 2022; coordinate
attention from Hou et al., arXiv:2103.02907, spatial attention from Woo et al., arXiv:1807.06521. With SUGAR as in
Horuz et al., arXiv:2505.22074, section 4.2.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    LayerNorm2d,
    LayerType,
    SelectAdaptivePool2d,
    calculate_drop_path_rates,
    get_act_layer,
    get_device_dtype,
    trunc_normal_,
)
from timm.models import checkpoint_seq, generate_default_cfgs
from torch import Tensor, nn

from .._timm import feature_take_indices
from ..layers import Activation
from ._pretrained import CIFAR_INPUT, build_variant, cfg, register_variant

__all__ = ["Conv2NeXt"]

_layer_norm = partial(LayerNorm2d, eps=1e-6)


class CoordinateAttention(nn.Module):
    """Gates from the means along each spatial axis: ``(B, C, H, W) -> (B, C, H, W)``."""

    def __init__(self, channels: int, reduction: int = 2, device: Any = None, dtype: Any = None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        hidden = max(8, channels // reduction)
        self.conv1 = nn.Conv2d(channels, hidden, 1, **dd)
        self.bn1 = nn.BatchNorm2d(hidden, **dd)
        self.conv_h = nn.Conv2d(hidden, channels, 1, **dd)
        self.conv_w = nn.Conv2d(hidden, channels, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)
        y = F.hardswish(self.bn1(self.conv1(torch.cat([rows, columns], 2))))
        gate_h = self.conv_h(y[:, :, :height]).sigmoid()
        gate_w = self.conv_w(y[:, :, height:].transpose(2, 3)).sigmoid()
        gated: Tensor = x * gate_h * gate_w
        return gated


class SpatialAttention(nn.Module):
    """A gate for each position from the maximum and the mean over channels: ``(B, C, H, W) -> (B, C, H, W)``."""

    def __init__(self, kernel_size: int = 3, device: Any = None, dtype: Any = None):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.conv(torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)).sigmoid()
        return x * gate


class MixedAttention(nn.Module):
    """Coordinate attention on one half of the channels, spatial on the other, residual, then a channel shuffle."""

    def __init__(self, channels: int, device: Any = None, dtype: Any = None):
        super().__init__()
        self.groups = channels // 2
        self.ca = CoordinateAttention(self.groups, device=device, dtype=dtype)
        self.sa = SpatialAttention(device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        x = x + torch.cat([self.ca(x1), self.sa(x2)], 1)
        shuffled: Tensor = x.unflatten(1, (self.groups, 2)).transpose(1, 2).flatten(1, 2)
        return shuffled


class Conv2NeXtBlock(nn.Module):
    """Depthwise 3x3, inverted bottleneck with layer scale, depthwise 3x3: ``(B, C, H, W) -> (B, C, H, W)``."""

    def __init__(
        self,
        channels: int,
        drop_path: float = 0.0,
        ls_init_value: float = 1e-6,
        act_layer: LayerType = nn.GELU,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, **dd)
        self.bn0 = nn.BatchNorm2d(channels, **dd)
        self.pwconv1 = nn.Linear(channels, 4 * channels, **dd)
        self.act = get_act_layer(act_layer)()
        self.pwconv2 = nn.Linear(4 * channels, channels, **dd)
        self.gamma = nn.Parameter(torch.full((channels,), ls_init_value, **dd))
        self.dwconv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, **dd)
        self.bn1 = nn.BatchNorm2d(channels, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        u = self.bn0(self.dwconv(x))
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(u.permute(0, 2, 3, 1))))
        y = self.drop_path(self.bn1(self.dwconv2(u + y.permute(0, 3, 1, 2))))
        out: Tensor = x + y
        return out


class Conv2NeXtStage(nn.Sequential):
    """A sequence of blocks, with gradient checkpointing if `grad_checkpointing` is set."""

    def __init__(self, *blocks: nn.Module):
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            recomputed: Tensor = checkpoint_seq(self, x)
            return recomputed
        else:
            for block in self:
                x = block(x)
            return x


class Conv2NeXt(nn.Module):
    """Conv2NeXt: four stages, the stem at full resolution, one halving between the second and the third.

    Args:
        in_chans: Channels of the image.
        num_classes: Number of classes; 0 for no classifier.
        global_pool: Pooling before the classifier, as in timm; "" for none.
        depths: Number of blocks in each of the four stages.
        dims: Channels of each stage; stages 0 and 1 have the same number, and so have 2 and 3.
        ls_init_value: Initial layer scale.
        act_layer: Activation of the blocks, by name or class. The attentions' own gates are not affected.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly over the blocks.
        img_size: Nominal size, which timm records for the data pipeline; the network takes any size.

    Shape:
        ``(B, in_chans, H, W) -> (B, num_classes)``, any H and W of at least 2.

    Raises:
        ValueError: invalid dims: the attentions between stages 0 and 1, and 2 and 3, keep the number of channels.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: tuple[int, int, int, int] = (3, 3, 9, 3),
        dims: tuple[int, int, int, int] = (128, 128, 256, 256),
        ls_init_value: float = 1e-6,
        act_layer: LayerType = nn.GELU,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if len(depths) != 4 or len(dims) != 4 or dims[0] != dims[1] or dims[2] != dims[3] or any(d % 2 for d in dims):
            raise ValueError(f"Conv2NeXt needs four depths and four even dims (a, a, b, b), got {depths} and {dims}")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[3]

        self.downsample_layers = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(in_chans, dims[0], 1, **dd), _layer_norm(dims[0], **dd)),
                nn.Sequential(_layer_norm(dims[0], **dd), MixedAttention(dims[1], **dd)),
                nn.Sequential(nn.Conv2d(dims[1], dims[2], 2, stride=2, **dd), _layer_norm(dims[2], **dd)),
                nn.Sequential(_layer_norm(dims[2], **dd), MixedAttention(dims[3], **dd)),
            ]
        )
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stages = nn.ModuleList(
            Conv2NeXtStage(*(Conv2NeXtBlock(dim, rate, ls_init_value, act_layer, **dd) for rate in stage_rates))
            for dim, stage_rates in zip(dims, rates, strict=True)
        )
        feature_info: list[dict[str, Any]] = [
            dict(num_chs=dim, reduction=reduction, module=f"stages.{i}")
            for i, (dim, reduction) in enumerate(zip(dims, (1, 1, 2, 2), strict=True))
        ]
        self.feature_info = feature_info
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=False)
        norm: nn.Module = _layer_norm(dims[3], **dd)
        self.norm = norm
        self.flatten = nn.Flatten(1) if global_pool else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dims[3], num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.apply(_init_weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        if coarse:
            return dict(stem=r"^downsample_layers\.0", blocks=r"^(?:downsample_layers|stages)\.(\d+)")
        blocks = [(r"^downsample_layers\.(\d+)", (0,)), (r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^downsample_layers\.0", blocks=blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            assert isinstance(stage, Conv2NeXtStage)
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling if `global_pool` is given; the final norm stays."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=False).train(self.training)
            self.flatten = (nn.Flatten(1) if global_pool else nn.Identity()).train(self.training)
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, **get_device_dtype(self)).train(self.training)
            _init_weights(self.head)
        else:
            self.head = nn.Identity().train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,  # the last n, these, or all
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the output of `forward_features` and the outputs of the stages, ``(B, C, H, W)`` each, as in timm.

        The final norm belongs to the head, so `norm` changes nothing.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice these
            downsample_layers, stages = self.downsample_layers, self.stages
        else:
            downsample_layers, stages = self.downsample_layers[: last + 1], self.stages[: last + 1]
        for i, (downsample, stage) in enumerate(zip(downsample_layers, stages)):  # noqa: B905
            x = stage(downsample(x))
            if i in take:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`; the head goes with them."""
        take, last = feature_take_indices(len(self.stages), indices)
        shorter = last + 1 < len(self.stages)
        self.downsample_layers = self.downsample_layers[: last + 1]
        self.stages = self.stages[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or prune_head or shorter:
            self.norm = nn.Identity()
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages):  # noqa: B905, TorchScript has no strict
            x = stage(downsample(x))
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.flatten(self.norm(self.global_pool(x))))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _create_conv2next(variant: str, pretrained: bool, **kwargs: Any) -> Conv2NeXt:
    # timm's other feature extractors need a network whose children run in sequence.
    features = dict(out_indices=(0, 1, 2, 3), feature_cls="getter")
    return build_variant(Conv2NeXt, variant, pretrained, **dict(feature_cfg=features) | kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    inputs = CIFAR_INPUT | dict(num_classes=100, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
    names = dict(first_conv="downsample_layers.0.0", classifier="head")
    return cfg(**inputs | names | dict(pool_size=(16, 16)) | kwargs)


_CONV2NEXT = dict(
    paper_ids=None,
    paper_name="Conv2NeXt: Reconsidering ConvNeXt Network Design for Image Recognition",
    origin_url=None,
)

default_cfgs = generate_default_cfgs(
    {
        "conv2next_tiny": _cfg(**_CONV2NEXT),
        "conv2next_base": _cfg(**_CONV2NEXT),
        "conv2next_large": _cfg(**_CONV2NEXT),
        "conv2next_sugar.cifar10": _cfg(
            hf_hub_id="timm-sugar/conv2next_sugar.cifar10",
            num_classes=10,
            mean=(0.4924, 0.4833, 0.4475),
            std=(0.2446, 0.2423, 0.2604),
        ),
        "conv2next_sugar.*": _cfg(),
    }
)

_BASE = dict(depths=(3, 3, 9, 3), dims=(128, 128, 256, 256))


@register_variant()
def conv2next_tiny(pretrained: bool = False, **kwargs: Any) -> Conv2NeXt:
    """Conv2NeXt-Tiny with GELU (Feng et al., CAIT 2022)."""
    model_args = dict(depths=(3, 3, 6, 3), dims=(96, 96, 192, 192))
    return _create_conv2next("conv2next_tiny", pretrained, **dict(model_args, **kwargs))


@register_variant()
def conv2next_base(pretrained: bool = False, **kwargs: Any) -> Conv2NeXt:
    """Conv2NeXt-Base with GELU (Feng et al., CAIT 2022)."""
    return _create_conv2next("conv2next_base", pretrained, **dict(_BASE, **kwargs))


@register_variant()
def conv2next_large(pretrained: bool = False, **kwargs: Any) -> Conv2NeXt:
    """Conv2NeXt-Large with GELU (Feng et al., CAIT 2022)."""
    model_args = dict(depths=(3, 3, 27, 3), dims=(196, 196, 384, 384))
    return _create_conv2next("conv2next_large", pretrained, **dict(model_args, **kwargs))


@register_variant(Activation("nelu", 0.1))
def conv2next_sugar(pretrained: bool = False, **kwargs: Any) -> Conv2NeXt:
    """Conv2NeXt-Base with SUGAR NeLU, alpha 0.1 (arXiv:2505.22074, section 4.2)."""
    return _create_conv2next("conv2next_sugar", pretrained, **dict(_BASE, **kwargs))
