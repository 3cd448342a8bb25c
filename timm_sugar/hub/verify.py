"""Verifying a published model: the accuracy that its card claims, measured again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, hf_hub_download

from ..data import load_source
from ..models import create_model
from ..models._weights import check_download
from .client import check_repo_id
from .publish import measure

# A claim has four digits, and float32 rounds differently on other hardware: one image in 10,000.
TOLERANCE = 0.5e-4 + 1e-4


@dataclass(frozen=True)
class Verification:
    """Top-1 accuracy as the card claims it and as measured, fractions of 1, and the number of test images."""

    claimed: float
    measured: float
    images: int

    @property
    def holds(self) -> bool:
        """Whether the two agree but for rounding."""
        return abs(self.claimed - self.measured) <= TOLERANCE


def verify(model: str, data: str, label_column: str | None = None, revision: str | None = None) -> Verification:
    """Measure again what the card of a published model claims.

    Args:
        model: A folder with config.json, model.safetensors and README.md, a run's folder, or ORG/NAME on the Hub.
        data: As `timm_sugar.data.load_source` takes it.
        label_column: Likewise; None for the one that the card names.
        revision: Of a repository: branch, tag or commit.

    Raises:
        ValueError: the card claims no accuracy, or the data has other classes.
        OSError: there is no such model, or a file of it is missing or corrupted.
    """
    folder = Path(model)
    if folder.is_dir():
        folder = folder / "model" if (folder / "model").is_dir() else folder
        source, card_path = f"local-dir:{folder}", folder / "README.md"
        if not card_path.is_file():
            raise FileNotFoundError(f"{folder} has no README.md, whose claim is to be verified")
    elif model.startswith((".", "/", "~")) or "/" not in model:
        raise FileNotFoundError(f"there is no folder {model}")
    else:
        check_repo_id(model)
        source = f"hf-hub:{model}@{revision}" if revision else f"hf-hub:{model}"
        card_path = Path(hf_hub_download(model, "README.md", revision=revision))
        check_download(card_path)
    claim = _claim(card_path, model)
    network = create_model(source, pretrained=True)
    arguments = claim.dataset_args or {}
    column = label_column or arguments.get("label_column")
    images = load_source(data, column, arguments.get("split_seed") or 0)
    cfg: Any = network.pretrained_cfg
    names = list(cfg["label_names"])
    if names != list(images.class_names):
        raise ValueError(
            f"{data} has other classes than {model}: {len(images.class_names)} beginning with "
            f"{images.class_names[0]!r}, not {len(names)} beginning with {names[0]!r}"
        )
    top1, count = measure(network, images.test)
    return Verification(claim.metric_value, top1, count)


def _claim(path: Path, model: str) -> EvalResult:
    try:
        results: list[EvalResult] = ModelCard.load(path).data.eval_results or []
    except ValueError as error:
        raise ValueError(f"the card of {model} cannot be read: {' '.join(str(error).split())}") from error
    for result in results:
        if result.metric_type == "accuracy" and isinstance(result.metric_value, float | int):
            return result
    raise ValueError(f"the card of {model} claims no accuracy")
