"""Models and data by command-line name: the folder of a run or of a published model, or a Hub repository."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from timm.models import is_model, parse_model_name
from torch import Tensor, nn

from ..data import (
    LabelledImages,
    NormalizedBatches,
    Source,
    Split,
    decode,
    eval_transform,
    load_source,
    normalize,
    split_validation,
    stratified_sample,
)
from ..files import read_mapping
from ..models import create_model
from ..models._download import download


@dataclass(frozen=True)
class NamedModel:
    """Location of a model, and its card.

    Attributes:
        name: The name as given.
        source: ``local-dir:FOLDER``, ``hf-hub:ORG/NAME`` or a registered name, for `create_model`.
        card: File of the model card, or None.
    """

    name: str
    source: str
    card: Path | None

    def load(self) -> nn.Module:
        """Build the network with the surrogate of its training, and load its weights."""
        return create_model(self.source, pretrained=True)

    def claim(self) -> EvalResult | None:
        """Return the accuracy on the card, with the data that it was measured on; None if there is none.

        Raises:
            ValueError: the card cannot be read.
        """
        if self.card is None:
            return None
        try:
            results: list[EvalResult] = ModelCard.load(self.card).data.eval_results or []
        except ValueError as error:
            raise ValueError(f"the card of {self.name} cannot be read: {' '.join(str(error).split())}") from error
        numbers = [result for result in results if isinstance(result.metric_value, float | int)]
        return next((result for result in numbers if result.metric_type == "accuracy"), None)

    def load_data(
        self, network: nn.Module, data: str, label_column: str | None = None, image_column: str | None = None
    ) -> Source:
        """As `load_any_data`, but raise ValueError if the classes of data and network differ."""
        images = self.load_any_data(data, label_column, image_column)
        cfg: Any = network.pretrained_cfg
        names = list(cfg.get("label_names") or [])
        if names and names != list(images.class_names):
            raise ValueError(
                f"{data} has other classes than {self.name}: {len(images.class_names)} beginning with "
                f"{images.class_names[0]!r}, not {len(names)} beginning with {names[0]!r}"
            )
        if len(images.class_names) != network.num_classes:
            raise ValueError(
                f"{data} has {len(images.class_names)} classes, but {self.name} has {network.num_classes} logits"
            )
        return images

    def load_any_data(self, data: str, label_column: str | None = None, image_column: str | None = None) -> Source:
        """Load data, possibly with other classes, split as in the network's training if the card specifies it.

        Args:
            data: As for `timm_sugar.data.load_source`.
            label_column, image_column: As for `load_source`; None for the column on the card.
        """
        claim = self.claim()
        told: dict[str, Any] = (claim and claim.dataset_args) or {}
        given = dict(label_column=label_column, image_column=image_column)
        return load_as_in_training(data, told | {name: column for name, column in given.items() if column})

    def settings(self) -> dict[str, Any]:
        """Return the training settings of a run's folder, else those on its card, else {}."""
        path = Path(self.name, "config.yaml")
        if path.is_file():
            return read_mapping(path)
        card = self.card.read_text(encoding="utf-8") if self.card else ""
        shown = re.search(r"^## Training settings\n+(`{3,})yaml\n(.*?)^\1$", card, re.MULTILINE | re.DOTALL)
        settings: dict[str, Any] = yaml.safe_load(shown[2]) if shown else {}
        return settings

    def validation_images(self, source: Source) -> tuple[str, LabelledImages]:
        """Return "val" and the validation images of the run, or "test" and the test images.

        The latter are used if there are no training settings, or if the run had no validation images.
        """
        settings = self.settings()
        if not settings.get("val_fraction"):
            return "test", source.test
        seed = settings["split_seed"]
        _, images = split_validation(source.train, settings["val_fraction"], seed)
        return "val", _limited(images, settings.get("limit_val"), seed)


def load_as_in_training(data: str, settings: Mapping[str, Any]) -> Source:
    """Load data with the known settings of a run: its columns, split and test images."""
    seed, columns = settings.get("split_seed") or 0, (settings.get("label_column"), settings.get("image_column"))
    skip_bad_images = bool(settings.get("skip_bad_images"))
    source = load_source(data, columns[0], seed, image_column=columns[1], skip_bad_images=skip_bad_images)
    return replace(source, test=_limited(source.test, settings.get("limit_test"), seed))


def _limited(images: LabelledImages, limit: int | None, seed: int) -> LabelledImages:
    return images if limit is None else images.subset(stratified_sample(images.labels, limit, seed))


def image_batches(network: nn.Module, images: LabelledImages) -> Iterator[tuple[Tensor, Tensor]]:
    """Decode images on demand with the evaluation transform of the training run; yield batches with labels.

    Returns:
        Batches of float32 (B, 3, H, W) and int64 (B,) on the network's device.
    """
    cfg: Any = network.pretrained_cfg
    device = next(network.parameters()).device
    split = Split(torch.from_numpy(images.labels), None, images, eval_transform(cfg))
    for pixels, labels in split.batches(torch.arange(len(images)).split(64)):
        yield normalize(pixels.to(device), cfg["mean"], cfg["std"]), labels.to(device)


def sample_batches(network: nn.Module, images: LabelledImages, limit: int, seed: int) -> NormalizedBatches:
    """Decode a stratified sample of `limit` images with the evaluation transform of the training run."""
    images = _limited(images, limit, seed)
    cfg: Any = network.pretrained_cfg
    pixels = decode(images, eval_transform(cfg))
    return NormalizedBatches(pixels, torch.from_numpy(images.labels), cfg["mean"], cfg["std"])


def check_repo_id(repo_id: str) -> None:
    """Raise a one-line ValueError if `repo_id` is not a valid ORG/NAME."""
    validate_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise ValueError(f"a repository is named ORG/NAME, got {repo_id!r}")


def find_model(model: str, revision: str | None = None) -> NamedModel:
    """Find a model by a name given by the user.

    Args:
        model: A folder with config.json and weights written by this package, timm or transformers, a run's folder,
            ORG/NAME on the Hub, or a registered model with published weights. A folder may have the prefix
            ``local-dir:``, a repository ``hf-hub:``.
        revision: Branch, tag or commit of a repository.

    Raises:
        OSError: the model does not exist, the run is not finished, or the card is corrupted.
        ValueError: the name is invalid.
    """
    kind, place = parse_model_name(model) if model.startswith(("local-dir:", "hf-hub:")) else (None, model)
    if kind == "hf-hub":
        model, _, given = place.partition("@")
        revision = revision or given or None
    folder = Path(place)
    if folder.is_dir() and kind != "hf-hub":
        if (folder / "model").is_dir():
            folder = folder / "model"
        elif (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{model} holds a run without a model: it is not finished")
        readme = folder / "README.md"
        return NamedModel(place, f"local-dir:{folder}", readme if readme.is_file() else None)
    if kind is None and is_model(model.partition(".")[0]):
        return NamedModel(model, model, None)
    if kind == "local-dir" or model.startswith((".", "/", "~")) or "/" not in model:
        raise FileNotFoundError(f"there is no folder {place}")
    check_repo_id(model)
    try:
        card: Path | None = download(model, "README.md", revision)
    except RemoteEntryNotFoundError:
        card = None
    return NamedModel(model, f"hf-hub:{model}@{revision}" if revision else f"hf-hub:{model}", card)
