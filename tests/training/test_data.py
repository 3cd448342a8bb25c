"""A run and its data: which columns it reads, what is refused before it trains, and data that change under it."""

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import yaml
from PIL import Image, ImageOps

from tests.conftest import coloured_images, image_folder
from timm_sugar.hub import check_weights, verify
from timm_sugar.training import TrainConfig, train

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
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


def _invert(path):
    ImageOps.invert(Image.open(path)).save(path)


CHANGES = {
    "image replaced": (lambda f: _invert(f / "train/red/20.png"), r"images=[0-9a-f]{16}, not [0-9a-f]{16}"),
    "test image replaced": (lambda f: _invert(f / "test/blue/00.png"), "images="),
    "image removed": (lambda f: (f / "train/red/20.png").unlink(), "train_images=24, not 23; labels=.*; images="),
    "image added": (
        lambda f: shutil.copy(f / "test/red/20.png", f / "test/red/99.png"),
        "test_images=24, not 25; labels=.*; images=",
    ),
    "image moved": (lambda f: (f / "train/red/20.png").rename(f / "train/blue/20.png"), "labels=.*; images="),
    "new class": (
        lambda f: [shutil.copytree(f / split / "red", f / split / "white") for split in ("train", "test")],
        "train_images=24, not 32; test_images=24, not 32; classes=3, not 4; class_names=",
    ),
}  # fmt: skip


def test_data_that_changed_between_a_kill_and_the_next_start_are_refused(tmp_path):
    data, output, kept = (tmp_path / name for name in ("data", "run", "kept"))
    image_folder(data, 24, ("train", "test"))
    shutil.copytree(data, kept)
    config = _config(data, output, epochs=12, checkpoint_steps=1, hflip=0.5)
    program = "import sys, yaml; from timm_sugar.training import *; train(TrainConfig(**yaml.safe_load(sys.stdin)))"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, env=ENVIRONMENT) as process:
        process.stdin.write(yaml.safe_dump(dataclasses.asdict(config)).encode())
        process.stdin.close()
        while not any(output.glob("checkpoints/step-*/manifest.json")) and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    record = yaml.safe_load((output / "config.yaml").read_text())
    fingerprint = record["data_fingerprint"]
    assert [fingerprint[name] for name in ("train_images", "test_images", "classes")] == [24, 24, 3]
    assert len(record["mean"]) == len(record["std"]) == 3
    for change, message in CHANGES.values():
        change(data)
        with pytest.raises(ValueError, match=f"^{output} holds a run on other data, with {message}.*; bring") as caught:
            train(config)
        assert str(caught.value).endswith("; bring it back, give another --output, or --resume never to start over")
        shutil.rmtree(data)
        shutil.copytree(kept, data, copy_function=shutil.copyfile)  # with other times
    assert not (output / "summary.json").exists()
    for run in (config, dataclasses.replace(config, output=str(tmp_path / "whole"))):
        train(run)
    assert _weights(output) == _weights(tmp_path / "whole")


def test_data_that_changed_before_the_first_checkpoint_are_refused(tmp_path):
    image_folder(tmp_path / "data", 24, ("train", "test"))
    config = _config(tmp_path / "data", tmp_path / "run")
    train(config)
    for name in ("summary.json", "metrics.jsonl"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    _invert(tmp_path / "data" / "train" / "red" / "20.png")
    with pytest.raises(ValueError, match="holds a run on other data, with images="):
        train(config)
    train(_config(tmp_path / "data", tmp_path / "run", resume="never"))
    record = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    train(_config(tmp_path / "data", tmp_path / "new"))
    assert (
        record["data_fingerprint"] == yaml.safe_load((tmp_path / "new" / "config.yaml").read_text())["data_fingerprint"]
    )
    assert _weights(tmp_path / "run") == _weights(tmp_path / "new")


def test_data_that_moved_are_known_by_their_content(tmp_path):
    image_folder(tmp_path / "here", 24, ("train", "test"))
    train(_config(tmp_path / "here", tmp_path / "run"))
    weights = _weights(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "here").rename(tmp_path / "there")
    assert train(_config(tmp_path / "there", tmp_path / "run"))["data"] == str(tmp_path / "there")
    assert _weights(tmp_path / "run") == weights
    # A finished run reads no images, so nothing tells whether these are its own.
    with pytest.raises(ValueError, match=r"run holds a run with data=.*/there, not .*/here; give another --output"):
        train(_config(tmp_path / "here", tmp_path / "run"))


def test_another_mean_of_the_same_data_is_refused(tmp_path):
    image_folder(tmp_path / "data", 24, ("train", "test"))
    train(_config(tmp_path / "data", tmp_path / "run"))
    (tmp_path / "run" / "summary.json").unlink()
    train(_config(tmp_path / "data", tmp_path / "run"))
    (tmp_path / "run" / "summary.json").unlink()
    # Images that are not in memory are measured at their own size.
    with pytest.raises(ValueError, match=r"holds a run with (mean|std)=\[0\.\d+, 0\.\d+, 0\.\d+\], not \[0\.\d+"):
        train(_config(tmp_path / "data", tmp_path / "run", memory_limit=0))
    record = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    train(_config(tmp_path / "data", tmp_path / "run", memory_limit=0, mean=record["mean"], std=record["std"]))


def test_what_is_kept_of_the_images_changes_no_result(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TIMM_SUGAR_CACHE", str(tmp_path / "cache"))
    data = image_folder(tmp_path / "data", 24, ("train", "test"))
    train(_config(data, tmp_path / "off", cache_limit=0))
    assert not (tmp_path / "cache" / "images").exists()
    train(_config(data, tmp_path / "cold"))
    kept = sorted((tmp_path / "cache" / "images").iterdir())
    sizes = [2 * 3 * 8 + 4, *(count * 3 * 16 * 16 + 4 for count in (6, 18, 24))]
    assert sorted(path.stat().st_size for path in kept) == sizes  # mean and std; validation, training and test images
    with monkeypatch.context() as patch:
        patch.setattr("timm_sugar.data.loading.decode", lambda *args, **more: pytest.fail("decoded again"))
        patch.setattr("timm_sugar.training.images.channel_statistics", lambda *args: pytest.fail("measured again"))
        train(_config(data, tmp_path / "warm"))
    kept[0].write_bytes(kept[0].read_bytes()[:-1])
    train(_config(data, tmp_path / "damaged"))
    assert f"{kept[0]} is damaged; the images are decoded again\n" in capfd.readouterr().err
    monkeypatch.setenv("TIMM_SUGAR_CACHE", str(tmp_path / "data" / "train" / "red" / "20.png"))
    train(_config(data, tmp_path / "unwritable"))
    said = capfd.readouterr().err
    assert said.count("decoded images are not kept for the next start: Not a directory\n") == said.count("decoded") == 1
    for name in ("cold", "warm", "damaged", "unwritable"):
        assert _weights(tmp_path / name) == _weights(tmp_path / "off"), name


def test_statistics_of_images_that_are_not_in_memory_are_kept_too(tmp_path, monkeypatch):
    monkeypatch.setenv("TIMM_SUGAR_CACHE", str(tmp_path / "cache"))
    data = image_folder(tmp_path / "data", 24, ("train", "test"))
    for name in ("cold", "warm"):
        train(_config(data, tmp_path / name, hflip=0.5))
        monkeypatch.setattr(
            "timm_sugar.training.images.channel_statistics", lambda *args: pytest.fail("measured again")
        )
    assert _weights(tmp_path / "cold") == _weights(tmp_path / "warm")
    for name, settings in (("in memory", {}), ("others", {"hflip": 0.5, "split_seed": 1})):
        with pytest.raises(pytest.fail.Exception, match="measured again"):
            train(_config(data, tmp_path / name, **settings))


def test_test_images_that_are_not_in_memory_are_checked_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TIMM_SUGAR_CACHE", str(tmp_path / "cache"))
    image_folder(tmp_path / "data", 24, ("train", "test"), corrupt=[("test", 17)])
    settings = dict(memory_limit=0, mean=[0.5] * 3, std=[0.5] * 3)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"image .*/test/red/17\.png cannot be decoded"):
            train(_config(tmp_path / "data", tmp_path / "run", **settings))
    image_folder(tmp_path / "data", 24, ("test",))
    train(_config(tmp_path / "data", tmp_path / "run", **settings))
    monkeypatch.setattr("timm_sugar.training.images.compute_rows", lambda *args: pytest.fail("checked again"))
    train(_config(tmp_path / "data", tmp_path / "again", **settings))
    assert _weights(tmp_path / "again") == _weights(tmp_path / "run")
    with pytest.raises(pytest.fail.Exception, match="checked again"):
        train(_config(tmp_path / "data", tmp_path / "other", cache_limit=0, **settings))


def _nothing_trained(run):
    return not list(run.rglob("*.safetensors"))


def test_a_run_without_its_bad_images_is_measured_on_the_same_again(tmp_path):
    image_folder(tmp_path / "data", 24, ("train", "test"), corrupt=[("train", 3), ("test", 0), ("test", 9)])
    summary = train(_config(tmp_path / "data", tmp_path / "run", skip_bad_images=True))
    assert (summary["bad_images"], summary["test_images"]) == (3, 22)
    assert check_weights(tmp_path / "run").startswith("accuracy on 22 of 22 test images: ")
    found = verify(str(tmp_path / "run"), str(tmp_path / "data"))
    assert (found.holds, found.images) == (True, 22)


def test_corrupt_images_that_leave_nothing_are_refused(tmp_path):
    image_folder(tmp_path / "data", 24, ("train", "test"))
    for path in (tmp_path / "data" / "test").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:200])
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="none of the 24 test images can be decoded"):
        train(_config(tmp_path / "data", run, skip_bad_images=True))
    with pytest.raises(ValueError, match=r"image .*/test/blue/00\.png cannot be decoded: image file is truncated"):
        train(_config(tmp_path / "data", run, memory_limit=0, mean=[0.5] * 3, std=[0.5] * 3))
    shutil.copytree(tmp_path / "data" / "train", tmp_path / "data" / "test", dirs_exist_ok=True)
    for path in (tmp_path / "data" / "train" / "red").glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no training image of class 'red' can be decoded"):
        train(_config(tmp_path / "data", run, skip_bad_images=True))
    with pytest.raises(ValueError, match=r"image .*/train/red/16\.png cannot be decoded: it is empty"):
        train(_config(tmp_path / "data", run, hflip=0.5))
    assert _nothing_trained(run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(batch_size=1), "with batch_size 1 at img_size 16: BatchNorm would see one value a channel"),
        (dict(limit_train=1), "1 training images are too few: a forward pass takes at least two in each process"),
    ],
)
@pytest.mark.filterwarnings("ignore:no training image")
def test_a_single_image_for_batch_norm_is_refused(tmp_path, settings, message):
    image_folder(tmp_path / "data", 24, ("train", "test"))
    with pytest.raises(ValueError, match=message):
        train(_config(tmp_path / "data", tmp_path / "run", **settings))
    assert _nothing_trained(tmp_path / "run")


def test_single_images_without_batch_norm_are_trained(tmp_path):
    image_folder(tmp_path / "data", 12, ("train", "test"))
    model_args = dict(embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    settings = dict(batch_size=1, model="swin_tiny_sugar_nelu", model_args=model_args, img_size=32)
    assert train(_config(tmp_path / "data", tmp_path / "run", **settings))["train_images"] == 9


def test_classes_that_a_limit_leaves_out_are_said(tmp_path):
    image_folder(tmp_path / "data", 24, ("train", "test"))
    with pytest.warns(UserWarning, match="no training image of '(blue|green|red)'$"):
        train(_config(tmp_path / "data", tmp_path / "a", limit_train=2, batch_size=2))
    with pytest.warns(UserWarning, match="no validation image of '(blue|green|red)'$"):
        train(_config(tmp_path / "data", tmp_path / "b", limit_val=2))


def test_processes_with_different_data_are_refused(tmp_path):
    for rank in range(2):
        image_folder(tmp_path / str(rank) / "data", 24 + rank, ("train", "test"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    program = "from timm_sugar.training import main; main('a.py', 'text', 'resnet18_cifar10')"
    command = [sys.executable, "-c", program, "--data", "./data", "--output", str(tmp_path / "run")]
    processes = []
    for rank in range(2):
        place = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        environment = ENVIRONMENT | place | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        folder = tmp_path / str(rank)
        processes.append(subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True))
    shown = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], shown
    assert "a.py: error: processes 0 and 1 do not have the same data './data': train_images=24 and 25; " in shown[0]
