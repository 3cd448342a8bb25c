"""Models and data as a command line names them: a run's folder, a published folder, or a repository on the Hub."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.errors import RemoteEntryNotFoundError
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
from .client import check_repo_id


@dataclass(frozen=True)
class NamedModel:
    """Where a model is, and its card.

    Attributes:
        name: As it was given.
        source: ``local-dir:FOLDER``, ``hf-hub:ORG/NAME`` or a name in the registry, as `create_model` takes it.
        card: File of the model card, None where there is none.
    """

    name: str
    source: str
    card: Path | None

    def load(self) -> nn.Module:
        """Build the network, with the surrogate that it was trained with, and load its weights."""
        return create_model(self.source, pretrained=True)

    def folder(self, network: nn.Module) -> Path:
        """Return where the files are from which `load` made the network."""
        kind, _, place = self.source.partition(":")
        if kind == "local-dir":
            return Path(place)
        cfg: Any = network.pretrained_cfg
        repo_id, _, commit = cfg["hf_hub_id"].partition("@")
        return download(repo_id, "config.json", commit).parent

    def claim(self) -> EvalResult | None:
        """Return the accuracy that the card claims, with the data that it was measured on; None if it claims none.

        Raises:
            ValueError: the card cannot be read.
        """
        if self.card is None:
            return None
        try:
            results: list[EvalResult] = ModelCard.load(self.card).data.eval_results or []
        except ValueError as error:
            raise ValueError(f"the card of {self.name} cannot be read: {' '.join(str(error).split())}") from error
        for result in results:
            if result.metric_type == "accuracy" and isinstance(result.metric_value, float | int):
                return result
        return None

    def load_data(
        self, network: nn.Module, data: str, label_column: str | None = None, image_column: str | None = None
    ) -> Source:
        """Load the data for the network, split as in its training where the card tells how.

        Args:
            network: The model, loaded.
            data: As `timm_sugar.data.load_source` takes it.
            label_column, image_column: Likewise; None for the one that the card names.

        Raises:
            ValueError: the data has other classes.
        """
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
        """Load data that may have other classes, split as in the network's training where the card tells how."""
        claim = self.claim()
        arguments: dict[str, Any] = (claim and claim.dataset_args) or {}
        limit, seed = arguments.get("limit_test"), arguments.get("split_seed") or 0
        source = load_source(
            data,
            label_column or arguments.get("label_column"),
            seed,
            image_column=image_column or arguments.get("image_column"),
            skip_bad_images=bool(arguments.get("skip_bad_images")),
        )
        if limit is None:
            return source
        return replace(source, test=source.test.subset(stratified_sample(source.test.labels, limit, seed)))

    def settings(self) -> dict[str, Any]:
        """Return the training settings of a run's folder, else those that its card shows, else {}."""
        path = Path(self.name, "config.yaml")
        if path.is_file():
            return read_mapping(path)
        card = self.card.read_text(encoding="utf-8") if self.card else ""
        shown = re.search(r"^## Training settings\n+(`{3,})yaml\n(.*?)^\1$", card, re.MULTILINE | re.DOTALL)
        settings: dict[str, Any] = yaml.safe_load(shown[2]) if shown else {}
        return settings

    def validation_images(self, source: Source) -> tuple[str, LabelledImages]:
        """Return "val" and the images that a run was validated on, else "test" and the test images.

        The test images stand in for them where no settings of a run are there, or where it validated on none.
        """
        settings = self.settings()
        if not settings.get("val_fraction"):
            return "test", source.test
        seed, limit = settings["split_seed"], settings.get("limit_val")
        _, images = split_validation(source.train, settings["val_fraction"], seed)
        return "val", images if limit is None else images.subset(stratified_sample(images.labels, limit, seed))


def image_batches(network: nn.Module, images: LabelledImages, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Decode images as they are needed; yield them as the network was evaluated on them in training, and their labels.

    Returns:
        Batches of float32 (B, 3, H, W) and int64 (B,) on the network's device.
    """
    cfg: Any = network.pretrained_cfg
    device = next(network.parameters()).device
    split = Split(torch.from_numpy(images.labels), None, images, eval_transform(cfg))
    order = [list(range(i, min(i + size, len(images)))) for i in range(0, len(images), size)]
    for pixels, labels in split.batches(order):
        yield normalize(pixels.to(device), cfg["mean"], cfg["std"]), labels.to(device)


def sample_batches(network: nn.Module, images: LabelledImages, limit: int | None, seed: int = 0) -> NormalizedBatches:
    """Decode images, or a stratified sample of `limit` of them, as the network was evaluated on them in training."""
    if limit is not None and limit < len(images):
        images = images.subset(stratified_sample(images.labels, limit, seed))
    cfg: Any = network.pretrained_cfg
    pixels = decode(images, eval_transform(cfg))
    return NormalizedBatches(pixels, torch.from_numpy(images.labels), cfg["mean"], cfg["std"])


def find_model(model: str, revision: str | None = None) -> NamedModel:
    """Find a model by the name that a user gives.

    Args:
        model: A folder with config.json and weights that this package, timm or transformers wrote, a run's folder,
            ORG/NAME on the Hub, or a model of timm's registry that has published weights. ``local-dir:`` and
            ``hf-hub:`` may stand before the former and the latter.
        revision: Of a repository: branch, tag or commit.

    Raises:
        OSError: there is no such model, the run is not finished, or the card is corrupted.
        ValueError: the name is not legal.
    """
    kind, place = parse_model_name(model) if model.startswith(("local-dir:", "hf-hub:")) else (None, model)
    if kind == "hf-hub":
        model, _, given = place.partition("@")
        revision = revision or given or None
    folder = Path(place)
    if folder.is_dir() and kind != "hf-hub":
        published = (folder / "config.json").is_file()
        if (folder / "config.yaml").is_file() and not published and not (folder / "model").is_dir():
            raise FileNotFoundError(f"{model} holds a run without a model: it is not finished")
        folder = folder / "model" if (folder / "model").is_dir() else folder
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
