"""Predict the classes of images by any loaded network."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from ..activations import activation_kinds
from ..data import available_cpus, eval_transform, files_below, is_image_name, normalize, to_rgb, why_unreadable
from ..layers import Activation


@dataclass(frozen=True)
class Prediction:
    """Predicted classes of an image.

    Attributes:
        file: The image file as given.
        classes: The most probable classes in descending order: number, name and probability.
        error: Reason if there are none.
    """

    file: str
    classes: tuple[tuple[int, str, float], ...] = ()
    error: str | None = None


def image_files(paths: Sequence[str]) -> list[str]:
    """Return the given files in order; folders are searched recursively for image extensions, and sorted.

    Raises:
        FileNotFoundError: a file does not exist, or a folder holds no image.
    """
    found = []
    for path in paths:
        if Path(path).is_dir():
            inside = [file for file in files_below(Path(path)) if is_image_name(file)]
            if not inside:
                raise FileNotFoundError(f"the folder {path} holds no images")
            found += inside
        elif Path(path).exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"there is no file or folder {path}")
    return found


def class_names(network: nn.Module) -> list[str]:
    """Return the class names of a network: the recorded names, ImageNet's, or else numbers.

    Raises:
        ValueError: it has no classes, or the number of names differs.
    """
    cfg: Any = network.pretrained_cfg
    count: Any = network.num_classes
    if not count:
        raise ValueError("the network has no classes: it gives features")
    names = cfg.get("label_names")
    if names is None and (subset := infer_imagenet_subset(network)):
        info = ImageNetInfo(subset)
        names = [info.index_to_description(index) for index in range(count)]
    names = range(count) if names is None else names
    if len(names) != count:
        raise ValueError(f"the network has {count} classes, and its config.json names {len(names)}")
    return [str(name) for name in names]


def summary_line(network: nn.Module) -> str:
    """Return a summary of a loaded network: architecture, activation, classes and images."""
    cfg: Any = network.pretrained_cfg
    own = Activation.of(network)
    alpha = "" if own.alpha is None else f" {own.alpha:g}"
    activation = f"SUGAR {own.surrogate}{alpha}" if own.surrogate else " and ".join(activation_kinds(network))
    side = "x".join(map(str, dict.fromkeys(cfg["input_size"][1:])))
    imagenet = cfg.get("label_names") is None and infer_imagenet_subset(network)
    classes = f"{network.num_classes} classes{' under the names of ImageNet' * bool(imagenet)}"
    return f"{cfg['architecture']}, {activation or 'no activation known'}, {classes}, {side} px"


@torch.inference_mode()
def predict(network: nn.Module, files: Sequence[str], top: int = 5, batch_size: int = 64) -> Iterator[Prediction]:
    """Yield the most probable classes of each file, in order.

    Args:
        network: A classifier of RGB images loaded by timm or this package, on any device. Its pretrained_cfg defines
            the evaluation transform; a separate test resolution is ignored.
        files: Images in any format that Pillow reads.
        top: Number of classes per image.
        batch_size: Images per forward pass.

    Raises:
        ValueError: the network has no classes, or does not take RGB images.
    """
    cfg: Any = network.pretrained_cfg
    if cfg["input_size"][0] != 3:
        raise ValueError(f"the network takes images of {cfg['input_size'][0]} channels, not RGB")
    names, transform = class_names(network), eval_transform(cfg)
    device = next(network.parameters()).device
    network.eval()

    def read(file: str) -> Tensor | str:
        try:
            return torch.as_tensor(transform(to_rgb(Path(file).read_bytes())))
        except Exception as error:  # Pillow's decoders raise many kinds
            return why_unreadable(error)

    remaining = iter(files)
    with ThreadPoolExecutor(available_cpus()) as pool:
        while part := list(islice(remaining, batch_size)):
            read_images = list(pool.map(read, part))
            good = [image for image in read_images if isinstance(image, Tensor)]
            rows: Iterator[Tensor] = iter(())
            if good:
                logits: Tensor = network(normalize(torch.stack(good).to(device), cfg["mean"], cfg["std"]))
                rows = iter(logits.float().softmax(1).cpu())
            for file, image in zip(part, read_images, strict=True):
                if isinstance(image, str):
                    yield Prediction(file, error=image)
                elif (probabilities := next(rows)).isnan().any():
                    yield Prediction(file, error="cannot be classified: the network's logits are not finite")
                else:
                    best = probabilities.topk(min(top, len(names)))
                    shown = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                    yield Prediction(file, tuple((number, names[number], value) for number, value in shown))
