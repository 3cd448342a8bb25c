"""A run and its data: which columns it reads, and what is refused before it trains."""

import datasets

from tests.conftest import coloured_images
from timm_sugar.hub import verify
from timm_sugar.training import TrainConfig, train

SMALL = {"channels": [8, 8, 8, 8]}


def _config(data, output, **settings):
    defaults = dict(img_size=16, batch_size=8, epochs=1, model_args=SMALL, val_fraction=0.25, workers=0)
    return TrainConfig(data=str(data), output=str(output), **defaults | settings)


def _weights(run):
    return (run / "model" / "model.safetensors").read_bytes()


def test_the_image_column_is_a_setting_that_the_card_names(tmp_path):
    images, labels = coloured_images(24, 0)
    columns = {"mask": [image.convert("1") for image in images], "photo": images, "label": labels}
    features = {"mask": datasets.Image(), "photo": datasets.Image(), "label": datasets.Value("int64")}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    for split in ("train", "test"):
        table.to_parquet(tmp_path / "both" / f"{split}.parquet")
        table.remove_columns("mask").to_parquet(tmp_path / "photos" / f"{split}.parquet")
    train(_config(tmp_path / "photos", tmp_path / "photo"))
    for column in ("photo", "mask"):
        train(_config(tmp_path / "both", tmp_path / f"run-{column}", image_column=column))
    assert _weights(tmp_path / "run-photo") == _weights(tmp_path / "photo")
    assert _weights(tmp_path / "run-mask") != _weights(tmp_path / "photo")
    found = verify(str(tmp_path / "run-photo"), str(tmp_path / "both"))  # the card names the column
    assert found.holds
    assert found.images == 24
