"""Evaluation of a classifier, shared by training, model cards and verification, in one or several processes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .transforms import normalize

MOST_CONFUSED = 100  # classes


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy in nats, top-1 and top-5 accuracy as fractions of 1, and the number of images.

    Attributes:
        class_top1: Top-1 accuracy of each class, None for a class without images; () if not requested.
        confusion: Confusion matrix of counts, rows are classes, columns are predictions; None for more than
            `MOST_CONFUSED` classes.
    """

    loss: float
    top1: float
    top5: float
    images: int
    class_top1: Sequence[float | None] = ()
    confusion: list[list[int]] | None = None


@dataclass(frozen=True)
class NormalizedBatches:
    """Images in memory as batches for a network; can be iterated any number of times.

    Attributes:
        pixels: uint8, (N, 3, H, W).
        labels: int64, (N,).
        mean, std: Statistics of each channel, for pixels in [0, 1].
        batch_size: Images per batch.
    """

    pixels: Tensor
    labels: Tensor
    mean: Sequence[float]
    std: Sequence[float]
    batch_size: int = 64

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images, float32, (B, 3, H, W), and labels, int64, (B,)."""
        for pixels, labels in zip(self.pixels.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield normalize(pixels, self.mean, self.std), labels


def evaluate_batches(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    mean: Sequence[float],
    std: Sequence[float],
    shared: bool = True,
    after_batch: Callable[[], None] | None = None,
    classes: int = 0,
) -> Evaluation:
    """Evaluate `model` in eval mode and float32, and restore its mode.

    Args:
        model: Classifier, normalised images (N, 3, H, W) -> logits (N, classes).
        batches: uint8 images (N, 3, H, W) and int64 labels (N,); N may be 0.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel.
        shared: In a process group, each process passes its own images, and the result covers all of them.
        after_batch: Called after each batch.
        classes: Number of classes, for accuracy by class; 0 for none.

    Examples:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2), nn.ReLU())
        >>> batch = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
        >>> evaluate_batches(model, [batch], mean=(0.5,) * 3, std=(0.5,) * 3).top1  # all images are the same
        0.5
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    # Counts per class: by prediction, or only wrong and right.
    columns = classes if classes <= MOST_CONFUSED else 2
    counts = torch.zeros(classes * columns, dtype=torch.int64, device=device)
    try:
        for pixels, labels in batches:
            if len(labels):
                logits = model(normalize(pixels.to(device, non_blocking=True), mean, std)).float()
                target = labels.to(device, non_blocking=True)
                guesses = logits.topk(min(5, logits.shape[1])).indices
                ranked = guesses == target[:, None]
                loss = F.cross_entropy(logits, target, reduction="sum")
                sums[:3] += torch.stack([loss, ranked[:, 0].sum(), ranked.sum()]).double()
                sums[3] += len(labels)
                if classes:
                    found = guesses[:, 0] if columns == classes else ranked[:, 0].long()
                    counts.index_add_(0, columns * target + found, torch.ones_like(target))
            if after_batch is not None:
                after_batch()
    finally:
        model.train(was_training)
    if shared and dist.is_initialized():
        dist.all_reduce(sums)
        if classes:
            dist.all_reduce(counts)
    table = counts.view(classes, columns).tolist() if classes else []
    right = [row[index if columns == classes else 1] for index, row in enumerate(table)]
    class_top1 = [hits / sum(row) if sum(row) else None for hits, row in zip(right, table, strict=True)]
    confusion = table if classes and columns == classes else None
    loss, top1, top5, images = sums.tolist()
    return Evaluation(loss / images, top1 / images, top5 / images, round(images), class_top1, confusion)
