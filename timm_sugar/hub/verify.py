"""Verifying a published model: the accuracy that its card claims, measured again."""

from dataclasses import dataclass

from .loading import find_model
from .publish import measure
from .reload import check_reload

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


def verify(
    model: str,
    data: str,
    label_column: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
) -> Verification:
    """Measure again what the card of a published model claims.

    Args:
        model: A folder with config.json, model.safetensors and README.md, a run's folder, or ORG/NAME on the Hub.
        data: As `timm_sugar.data.load_source` takes it.
        label_column, image_column: Likewise; None for the one that the card names.
        revision: Of a repository: branch, tag or commit.

    Raises:
        ValueError: the card claims no accuracy, the network does not load as it says, or the data has other classes.
        OSError: there is no such model, or a file of it is missing or corrupted.
    """
    found = find_model(model, revision)
    if found.card is None:
        raise FileNotFoundError(f"{model} has no README.md, whose claim is to be verified")
    claim = found.claim()
    if claim is None:
        raise ValueError(f"the card of {model} claims no accuracy")
    network = found.load()
    check_reload(found.folder(network), network)
    images = found.load_data(network, data, label_column, image_column)
    top1, count = measure(network, images.test)
    return Verification(claim.metric_value, top1, count)
