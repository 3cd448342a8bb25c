"""Weights in float16, except one-dimensional tensors, and the accuracy of the saved file."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..data import LabelledImages
from ..files import read_mapping, write_file
from ..models._weights import WEIGHTS
from .publish import MODEL_FILES, RUN_FILES, evaluate_images, model_folder, read_test_images

TOLERANCE = 0.0005  # of the accuracy, a fraction of 1
_BATCH = 256


def to_float16(output: Path, folder: Path, data: str | None = None) -> Path:
    """Copy a finished run with its weights in float16, one-dimensional tensors in float32.

    The copy's summary.json holds the accuracy of the saved file on all test images, loaded by timm, next to that of
    the float32 weights. Loaded by transformers, with its own image processor, the accuracy must agree too.

    Args:
        output: Folder of a finished run.
        folder: Destination folder.
        data: Current location of the test images; None for that in training.

    Returns:
        `folder`, a run for `published_files`.

    Raises:
        ValueError: the accuracy differs from that of the float32 weights by more than 0.05 points, or the weights are
            not finite in float16.
        OSError, ModuleNotFoundError: the test images or transformers are not available.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError("--half measures the accuracy in transformers: pip install transformers")
    source, model = model_folder(output), folder / "model"
    images = read_test_images(output, data)
    model.mkdir(parents=True)
    for path in (*(output / name for name in RUN_FILES), *output.glob("*.png")):
        shutil.copy(path, folder)
    for name in MODEL_FILES:
        shutil.copy(source / name, model)
    save_file(_to_float16(load_file(source / WEIGHTS)), model / WEIGHTS, metadata={"format": "pt"})

    summary = read_mapping(folder / "summary.json")
    recorded = summary.get("float32_test_top1", summary["test_top1"])
    stored = evaluate_images(timm.create_model(f"local-dir:{model}", pretrained=True), images)
    elsewhere = _top1_in_transformers(model, images)
    if max(abs(stored.top1 - recorded), abs(elsewhere - recorded)) > TOLERANCE:
        raise ValueError(
            f"in float16 the accuracy is {100 * stored.top1:.2f}% in timm and {100 * elsewhere:.2f}% in transformers, "
            f"more than {100 * TOLERANCE:.2f} points from the {100 * recorded:.2f}% in float32"
        )
    summary |= dict(test_top1=stored.top1, test_top5=stored.top5, test_loss=stored.loss)
    summary |= dict(float32_test_top1=recorded, transformers_test_top1=elsewhere)
    write_file(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return folder


def _to_float16(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    halved = {name: t.half() if t.is_floating_point() and t.dim() > 1 else t for name, t in tensors.items()}
    for name, tensor in halved.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has values beyond the range of float16")
    return halved


@torch.inference_mode()
def _top1_in_transformers(folder: Path, images: LabelledImages) -> float:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    processor = AutoImageProcessor.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: nn.Module = AutoModelForImageClassification.from_pretrained(folder).eval().to(device)
    labels, correct = torch.from_numpy(images.labels), 0
    for rows in torch.arange(len(images)).split(_BATCH):
        inputs: Any = processor(images=[images[row] for row in rows.tolist()], return_tensors="pt").to(device)
        correct += (model(**inputs).logits.argmax(1).cpu() == labels[rows]).sum().item()
    return correct / len(images)
