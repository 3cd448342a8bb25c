"""Checkpoints: what is read back, what is never used, what stays when the disk fails."""

import json

import pytest
import torch

from timm_sugar.training.checkpoint import (
    FORMAT,
    Checkpoint,
    State,
    is_complete,
    latest_checkpoint,
    list_checkpoints,
    read_checkpoint,
    write_checkpoint,
)


def _write(folder, step, value=0.0, keep=2):
    weights = {"w": torch.full((3,), value), "t": torch.arange(6.0).view(2, 3).t()}
    optimizer = {"optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}}
    checkpoint = Checkpoint(weights, {"w": torch.zeros(3)}, optimizer, State(epoch=step, metrics=[{"lr": 0.1}]))
    return write_checkpoint(folder, step, checkpoint, keep)


def test_round_trip(tmp_path):
    path = _write(tmp_path, 12, 2.5)
    read = read_checkpoint(path)
    assert torch.equal(read.weights["w"], torch.full((3,), 2.5))
    assert torch.equal(read.weights["t"], torch.arange(6.0).view(2, 3).t())
    assert torch.equal(read.best["w"], torch.zeros(3))
    assert read.state == State(epoch=12, metrics=[{"lr": 0.1}])
    assert torch.equal(read.optimizer["optimizer"]["state"][0]["momentum_buffer"], torch.ones(3))


def test_only_the_newest_are_kept(tmp_path):
    (tmp_path / "step-000000002.tmp").mkdir()
    for step in (1, 3, 20, 100):
        _write(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000000020", "step-000000100"]
    assert latest_checkpoint(tmp_path).name == "step-000000100"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip", "no manifest", "manifest cut short"])
def test_damaged_checkpoints_are_never_used(tmp_path, damage):
    _write(tmp_path, 1)
    newest = _write(tmp_path, 2)
    weights, manifest = newest / "model.safetensors", newest / "manifest.json"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "remove":
        weights.unlink()
    elif damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:20])
    assert not is_complete(newest)
    assert latest_checkpoint(tmp_path).name == "step-000000001"
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        read_checkpoint(newest)
    assert is_complete(_write(tmp_path, 2))  # written again over the damaged one


def test_a_failing_disk_leaves_the_last_good_one(tmp_path, monkeypatch):
    good = _write(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        _write(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == good
    assert [path.name for path in tmp_path.iterdir()] == [good.name]


def test_manifest_names_every_file_and_the_format(tmp_path):
    path = _write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == FORMAT == 3
    assert set(manifest["sha256"]) == {file.name for file in path.iterdir()} - {"manifest.json"}


def test_the_first_format_is_read_and_a_later_one_refused(tmp_path):
    path = _write(tmp_path, 1, 2.5)
    manifest = path / "manifest.json"
    hashes = json.loads(manifest.read_text())["sha256"]
    manifest.write_text(json.dumps(hashes))  # as before there was a format
    assert latest_checkpoint(tmp_path) == path
    assert torch.equal(read_checkpoint(path).weights["w"], torch.full((3,), 2.5))
    manifest.write_text(json.dumps({"format": 4, "files": hashes}))
    message = r"step-000000001 is of checkpoint format 4; this version of timm-sugar reads up to 3$"
    for use in (lambda: read_checkpoint(path), lambda: latest_checkpoint(tmp_path)):
        with pytest.raises(ValueError, match=message):
            use()
