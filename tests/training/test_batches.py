"""Training batches: the same from memory as from loader workers, to the bit, whatever the process and the start."""

import pytest
import torch

from timm_sugar.training import TrainConfig
from timm_sugar.training.batches import training_batches
from timm_sugar.training.images import epoch_order
from timm_sugar.training.train import build

STATISTICS = dict(mean=[0.4, 0.5, 0.45], std=[0.25, 0.26, 0.27])
AUGMENTED = {
    "nothing": {},
    "flip": dict(hflip=0.5, crop_pct=0.8),
    "crop": dict(crop="padded", crop_pct=0.8),
    "both": dict(crop="padded", hflip=0.3, channels_last=True),
}


def run_of(data, tmp_path, **more):
    small = dict(
        model_args={"channels": [8, 8, 8, 8]}, img_size=24, limit_train=50, batch_size=16, output=str(tmp_path)
    )
    return build(TrainConfig(data=data, **STATISTICS, **small, **more))


def batches(run, parts, epoch=3):
    return [*training_batches(run.config, run.images, torch.device("cpu"), epoch, parts)]


@pytest.mark.parametrize("way", AUGMENTED)
def test_from_memory_as_from_workers(way, parquet_folder, tmp_path):
    held = run_of(parquet_folder, tmp_path / "held", **AUGMENTED[way])
    needed = run_of(parquet_folder, tmp_path / "needed", memory_limit=0, workers=2, **AUGMENTED[way])
    assert held.images.train.pixels is not None
    assert needed.images.train.pixels is None
    parts = epoch_order(42, 3, 50)[1::2].split(16)  # of the second of two processes
    found, wanted = batches(held, parts), batches(needed, parts)
    assert [len(labels) for _, labels in found] == [16, 9]
    for (inputs, labels), (others, other_labels) in zip(found, wanted, strict=True):
        assert torch.equal(labels, other_labels)
        assert torch.equal(inputs, others)
        layout = torch.channels_last if held.config.channels_last else torch.contiguous_format
        assert inputs.is_contiguous(memory_format=layout)
    if way != "nothing":
        assert not torch.equal(found[0][0], batches(held, parts, epoch=4)[0][0])
    assert torch.equal(batches(held, parts[1:])[0][0], found[1][0])  # as a run that goes on within an epoch


@pytest.mark.parametrize("more", [dict(crop="resized"), dict(hflip=0.5, color_jitter=0.4), dict(re_prob=0.2)])
def test_other_augmentation_takes_each_image_by_itself(more, parquet_folder, tmp_path):
    run = run_of(parquet_folder, tmp_path, **more)
    assert run.images.train.pixels is None
    assert run.images.crop_flip is None
    assert run.images.val.pixels is not None
