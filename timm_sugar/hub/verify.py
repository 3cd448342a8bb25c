"""Verifying a published model: every number that its card claims, measured again."""

import itertools
import re
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard
from torch import nn

from ..analysis.units import count_units
from ..data import LabelledImages, decode, eval_transform, evaluate_batches
from ..metrics import METRICS, find_metric
from ..terminal import progress_bars
from .card import dataset_of
from .loading import find_model
from .reload import check_reload

# A claim has four digits, and float32 rounds differently on other hardware: one image in 10,000.
TOLERANCE = 0.5e-4 + 1e-4
# What is not of the test images is of the weights before they were stored, in float16 perhaps (see `to_float16`).
_BEFORE_STORING = 0.5e-4 + 5e-4
_BATCH = 256


@dataclass(frozen=True)
class Claim:
    """A number on a card.

    Attributes:
        label: What it is, such as "test top-1 accuracy".
        place: "model-index" or "table".
        claimed: A fraction of 1; None for what is no number.
        measured: The same as measured; None where it is not measured, such as for another data set.
    """

    label: str
    place: str
    claimed: float | None
    measured: float | None
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the two agree but for rounding."""
        if self.claimed is None or self.measured is None:
            return False
        return abs(self.claimed - self.measured) <= self.tolerance


@dataclass(frozen=True)
class Verification:
    """The claims of a card, and the number of test images."""

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
    """Measure again what the card of a published model claims: all entries of its model-index, and its table.

    Args:
        model: A folder with config.json, model.safetensors and README.md, a run's folder, or ORG/NAME on the Hub.
        data: As `timm_sugar.data.load_source` takes it.
        label_column, image_column: Likewise; None for the one that the card names.
        revision: Of a repository: branch, tag or commit.
        show_progress: Say on standard error what is done, and how far it is.

    Raises:
        ValueError: the card claims no accuracy, the network does not load as it says, or the data has other classes.
        OSError: there is no such model, or a file of it is missing or corrupted.
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
        check_reload(found.folder(network), network)
    source = found.load_data(network, data, label_column, image_column)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    measured = _measure(network, source.test, "test", show_progress)
    if any(key and find_metric(key).split == "val" for _, _, _, key in claims):
        split, images = found.validation_images(source)
        if split == "val":
            measured |= _measure(network, images, "val", show_progress)
        elif any(key == "val_top1" for _, _, _, key in claims):  # on images that nobody can tell any more
            measured = {key: value for key, value in measured.items() if key.startswith("test")}
    return Verification([_judge(*claim, measured) for claim in claims], len(source.test))


def _judge(label: str, place: str, claimed: float | None, key: str | None, measured: dict[str, float]) -> Claim:
    of_file = key is not None and find_metric(key).split == "test"
    return Claim(label, place, claimed, measured.get(key or ""), TOLERANCE if of_file else _BEFORE_STORING)


def _of_model_index(results: list[EvalResult], data: str) -> list[tuple[str, str, float | None, str | None]]:
    """Return label, place, value and metric of each entry; no metric where it is of other data or is not measured."""

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
        claims.append((name, "model-index", value, key))
    return claims


def _of_table(text: str) -> list[tuple[str, str, float | None, str | None]]:
    """Return the same of each row of the card's tables that have a column "this model"."""
    keys = {metric.label: metric.key for metric in METRICS if metric.card}
    claims: list[tuple[str, str, float | None, str | None]] = []
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if cells[1:2] == ["this model"]:
            inside = True
        elif not cells:
            inside = False
        elif inside and not set("".join(cells)) <= set("-: "):
            percent = re.fullmatch(r"(\d+(?:\.\d+)?)%", cells[1]) if len(cells) > 1 else None
            claims.append((cells[0], "table", float(percent[1]) / 100 if percent else None, keys.get(cells[0])))
    return claims


def _measure(network: nn.Module, images: LabelledImages, split: str, show_progress: bool) -> dict[str, float]:
    """Return the metrics of a network on images, by key, as training measures them."""
    cfg: Any = network.pretrained_cfg
    title = f"{dict(test='test', val='validation')[split]} images"
    pixels = decode(images, eval_transform(cfg), title=f"decoding {title}" if show_progress else None)
    batches = zip(pixels.split(_BATCH), torch.from_numpy(images.labels).split(_BATCH), strict=True)
    done = itertools.count(_BATCH, _BATCH)
    with progress_bars(*[title] * show_progress, every=10) as bars, count_units(network) as units:

        def after_batch() -> None:
            so_far = min(next(done), len(images))
            for bar in bars:
                bar(so_far, len(images))

        result = evaluate_batches(network, batches, cfg["mean"], cfg["std"], False, after_batch)
    found = {f"{split}_loss": result.loss, f"{split}_top1": result.top1, f"{split}_top5": result.top5}
    return found | {"dead_units": units.dead_units, "activation_sparsity": units.sparsity}
