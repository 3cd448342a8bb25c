"""Evaluation against figures computed by hand."""

import pytest
import torch
from torch import nn

from timm_sugar.data import evaluate_batches, evaluation


class FirstPixels(nn.Module):
    """Takes the first six pixels as logits."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        assert not self.training
        return x.flatten(1)[:, :6] * self.scale


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluate(batch_size):
    pixels = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    first = torch.tensor([[255, 1, 2, 3, 4, 5]] * 4, dtype=torch.uint8)  # class 0 is first, class 1 last of six
    pixels.view(4, -1)[:, :6] = first
    labels = torch.tensor([0, 0, 5, 1])
    model = FirstPixels().train()
    batches = zip(pixels.split(batch_size), labels.split(batch_size), strict=True)
    result = evaluate_batches(model, batches, (0.0,) * 3, (1.0,) * 3, shared=False)
    assert (result.top1, result.top5, result.images) == (0.5, 0.75, 4)
    expected = nn.functional.cross_entropy(first / 255, labels)
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)
    assert model.training


@pytest.mark.parametrize("most", [100, 3])
def test_classes_and_what_they_are_taken_for(most, monkeypatch):
    monkeypatch.setattr(evaluation, "MOST_CONFUSED", most)
    pixels = torch.zeros(5, 3, 2, 2, dtype=torch.uint8)
    labels, taken_for = torch.tensor([0, 0, 0, 2, 5]), [0, 3, 0, 2, 1]
    for image, guess in zip(pixels.view(5, -1), taken_for, strict=True):
        image[guess] = 200
    batches = zip(pixels.split(2), labels.split(2), strict=True)
    result = evaluate_batches(FirstPixels(), batches, (0.0,) * 3, (1.0,) * 3, shared=False, classes=6)
    assert result.class_top1 == [pytest.approx(2 / 3), None, 1.0, None, None, 0.0]
    expected = [[0] * 6 for _ in range(6)]
    expected[0][0], expected[0][3], expected[2][2], expected[5][1] = 2, 1, 1, 1
    assert result.confusion == (expected if most == 100 else None)
