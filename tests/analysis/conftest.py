"""Two finished runs on digits that differ in their activation alone."""

from pathlib import Path

import pytest

from timm_sugar.training import TrainConfig, train


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a run with SUGAR and of one with plain ReLU."""
    folder = tmp_path_factory.mktemp("runs")
    shared = dict(data="digits", img_size=16, limit_train=96, epochs=2, batch_size=32, opt="adamw", lr=0.01)
    network = dict(model="vgg16_cifar_sugar_bsilu", model_args={"cfg": [8, "M", 8, "M", 8], "norm_layer": ""})
    train(TrainConfig(**shared, **network, output=str(folder / "sugar")))
    train(TrainConfig(**shared, **network, act_layer="relu", output=str(folder / "relu")))
    return folder / "sugar", folder / "relu"
