"""Verify a published model: measure every number on its card again."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard
from torch import Tensor, nn

from ..analysis.units import count_units
from ..data import LabelledImages, decode, eval_transform, evaluate_batches
from ..metrics import METRICS, find_metric
from ..terminal import progress_bars
from .card import dataset_of
from .loading import find_model
from .reload import check_reload

# A claim has four digits, and float32 rounding on other hardware can change one image in 10,000.
TOLERANCE = 0.5e-4 + 1e-4
# Metrics on other images were measured before the weights were saved, perhaps in float16 (see `to_float16`).
_BEFORE_STORING = 0.5e-4 + 5e-4
_BATCH = 256


@dataclass(frozen=True)
class Claim:
    """A number on a card.

    Attributes:
        label: Description, such as "test top-1 accuracy".
        place: "model-index" or "table".
        claimed: The value on the card, a fraction of 1; None if it is not a number.
        key: Key of the metric; None if it is not measured, for example on another data set.
        measured: The measured value, or None.
    """

    label: str
    place: str
    claimed: float | None
    key: str | None
    measured: float | None = None

    @property
    def holds(self) -> bool:
        """Whether both values agree up to rounding."""
        if self.key is None or self.claimed is None or self.measured is None:
            return False
        of_file = find_metric(self.key).split == "test"
        return abs(self.claimed - self.measured) <= (TOLERANCE if of_file else _BEFORE_STORING)


@dataclass(frozen=True)
class Verification:
    """The claims on a card, and the number of test images."""

    claims: list[Claim]
    images: int

    @property
    def holds(self) -> bool:
        """Whether every claim was measured and holds."""
        return all(claim.holds for claim in self.claims)


def verify(
    model: str,
    data: str,
    label_column: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    show_progress: bool = False,
) -> Verification:
    """Measure the claims on a published model's card again: all entries of its model-index, and its table.

    Args:
        model: A folder with config.json, model.safetensors and README.md, a run's folder, or ORG/NAME on the Hub.
        data: As for `timm_sugar.data.load_source`.
        label_column, image_column: As for `load_source`; None for the column on the card.
        revision: Branch, tag or commit of a repository.
        show_progress: Show progress on standard error.

    Raises:
        ValueError: the card claims no accuracy, the network does not load as described, or the data has other classes.
        OSError: the model does not exist, or one of its files is missing or corrupted.
    """
    found = find_model(model, revision)
    if found.card is None:
        raise FileNotFoundError(f"{model} has no README.md, whose claim is to be verified")
    if found.claim() is None:
        raise ValueError(f"the card of {model} claims no accuracy")
    card = ModelCard.load(found.card)
    claims = [*_of_model_index(card.data.eval_results or [], data), *_of_table(card.text)]
    network = found.load()
    with progress_bars(*["loading it as its card says"] * show_progress):
        check_reload(found.card.parent, network)
    source = found.load_data(network, data, label_column, image_column)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    measured = _measure(network, source.test, "test", show_progress)
    keys = {claim.key for claim in claims if claim.key}
    if any(find_metric(key).split == "val" for key in keys):
        split, images = found.validation_images(source)
        if split == "val":
            measured |= _measure(network, images, "val", show_progress)
        elif "val_top1" in keys:  # the validation images are unknown
            measured = {key: value for key, value in measured.items() if key.startswith("test")}
    return Verification([replace(claim, measured=measured.get(claim.key or "")) for claim in claims], len(source.test))


def _of_model_index(results: list[EvalResult], data: str) -> list[Claim]:
    """Return one claim per entry of the model-index."""

    def data_of(result: EvalResult) -> tuple[Any, ...]:
        return result.dataset_type, result.dataset_name, result.dataset_config, result.dataset_split

    named = {name for name in dataset_of(data) if name}
    mine = next((r for r in results if {r.dataset_type, r.dataset_name} & named), results[0])
    claims = []
    for result in results:
        name = str(result.metric_name or result.metric_type)
        top5 = re.search("top.?5", f"{name} {result.metric_type}".lower())
        key = ("test_top5" if top5 else "test_top1") if result.metric_type in ("accuracy", "top5_accuracy") else None
        if data_of(result) != data_of(mine):
            name, key = f"{name} on {result.dataset_name}", None
        value = result.metric_value if isinstance(result.metric_value, int | float) else None
        claims.append(Claim(name, "model-index", value, key))
    return claims


def _of_table(text: str) -> list[Claim]:
    """Return one claim per row of the card's tables with a column "this model"."""
    keys = {metric.label: metric.key for metric in METRICS if metric.card}
    claims, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if cells[1:2] == ["this model"]:
            inside = True
        elif not cells:
            inside = False
        elif inside and not set("".join(cells)) <= set("-: "):
            percent = re.fullmatch(r"(\d+(?:\.\d+)?)%", cells[1]) if len(cells) > 1 else None
            value = float(percent[1]) / 100 if percent else None
            claims.append(Claim(cells[0], "table", value, keys.get(cells[0])))
    return claims


def _measure(network: nn.Module, images: LabelledImages, split: str, show_progress: bool) -> dict[str, float]:
    """Return the metrics of a network on images, by key, computed as in training."""
    cfg: Any = network.pretrained_cfg
    title = f"{dict(test='test', val='validation')[split]} images"
    pixels = decode(images, eval_transform(cfg), title=f"decoding {title}" if show_progress else None)
    labels = torch.from_numpy(images.labels)
    with progress_bars(*[title] * show_progress, every=10) as bars, count_units(network) as units:

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for start in range(0, len(labels), _BATCH):
                yield pixels[start : start + _BATCH], labels[start : start + _BATCH]
                for bar in bars:
                    bar(min(start + _BATCH, len(labels)), len(labels))

        result = evaluate_batches(network, batches(), cfg["mean"], cfg["std"], shared=False)
    found = {f"{split}_loss": result.loss, f"{split}_top1": result.top1, f"{split}_top5": result.top5}
    return found | {"dead_units": units.dead_units, "activation_sparsity": units.sparsity}
