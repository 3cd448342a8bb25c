"""The registered models. Files have the names of timm's modules, so timm.list_models(module="resnet") lists them."""

from ..convert import is_own
from . import conv2next, resnet, swin_transformer, vgg
from ._pretrained import build, create_model, size_arguments, stock_architecture

__all__ = [
    "build",
    "conv2next",
    "create_model",
    "is_own",
    "resnet",
    "size_arguments",
    "stock_architecture",
    "swin_transformer",
    "vgg",
]
