"""What goes into a training step, by value: the order of images, Mixup's targets and smoothing, and what is random."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from timm_sugar.training import TrainConfig
from timm_sugar.training.checkpoint import State
from timm_sugar.training.images import epoch_order
from timm_sugar.training.train import build, train_steps

SMALL = dict(
    data="digits", model="resnet18_cifar_sugar_bsilu", img_size=16, epochs=3, batch_size=16, limit_train=64,
    model_args={"channels": [8, 8, 8, 8]}, smoothing=0.1,
)  # fmt: skip


def run_of(tmp_path, **more):
    return build(TrainConfig(**{**SMALL, "output": str(tmp_path), **more}))


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_each_epoch_has_an_order_of_its_own_that_the_seed_decides(tmp_path, epoch):
    run = run_of(tmp_path)
    order = epoch_order(run.config.seed, epoch, 64)
    assert sorted(order.tolist()) == [*range(64)]
    assert not any(torch.equal(order, epoch_order(run.config.seed, other, 64)) for other in range(3) if other != epoch)
    assert not torch.equal(order, epoch_order(run.config.seed + 1, epoch, 64))
    seen = [labels for _, _, labels in train_steps(run, State(epoch=epoch))]
    assert torch.equal(torch.cat(seen), run.images.train.labels[order])


def test_a_run_that_goes_on_within_an_epoch_sees_the_rest_of_it(tmp_path):
    run = run_of(tmp_path)
    seen = [labels for _, _, labels in train_steps(run, State(epoch=1, position=3))]
    assert torch.equal(torch.cat(seen), run.images.train.labels[epoch_order(run.config.seed, 1, 64)[48:]])


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_labels_are_smoothed_once(tmp_path, monkeypatch, mixup):
    run, calls = run_of(tmp_path, mixup=mixup), []
    cross_entropy = F.cross_entropy

    def recorded(logits, targets, **kwargs):
        loss = cross_entropy(logits, targets, **kwargs)
        calls.append((logits.detach(), targets, loss.item()))
        return loss

    monkeypatch.setattr(F, "cross_entropy", recorded)
    loss, _, labels = next(train_steps(run, State()))
    logits, targets, found = calls[0]
    if mixup:  # a pair shares its images: a label, smoothed, and that of the image from the other end of the batch
        smooth = F.one_hot(labels, 10) * 0.9 + 0.01
        differs = smooth != smooth.flip(0)
        share = ((targets - smooth.flip(0))[differs] / (smooth - smooth.flip(0))[differs]).mean()
        torch.testing.assert_close(targets, smooth * share + smooth.flip(0) * (1 - share))
        assert 0 < share < 1
    else:
        assert torch.equal(targets, labels)
        targets = F.one_hot(labels, 10) * 0.9 + 0.01
    assert found == pytest.approx(-(targets * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5)
    assert loss.item() == pytest.approx(found)


def test_mixup_and_drop_path_are_functions_of_seed_and_step(tmp_path):
    def losses(state, noise, **more):
        run = run_of(tmp_path, mixup=0.8, model_args={**SMALL["model_args"], "drop_path_rate": 0.5}, lr=1e-9, **more)
        torch.manual_seed(noise)
        np.random.seed(noise)
        found = []
        for loss, _, _ in train_steps(run, state):
            found.append(loss.item())
            torch.rand(noise)
            np.random.rand(noise)
        return found

    first = losses(State(), noise=1)
    assert losses(State(), noise=2) == first
    assert losses(State(position=2), noise=3) == pytest.approx(first[2:], rel=1e-4)  # from the third step on
    assert losses(State(), noise=1, seed=7) != first
