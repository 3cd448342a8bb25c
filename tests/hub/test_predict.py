"""Classes of images from the command line: order, transform, names, and files that cannot be read."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_sugar
from timm_sugar.cli import main
from timm_sugar.hub import predict
from timm_sugar.hub.predict import class_names, summary_line

HUB_CARDS = Path(__file__).parents[2] / "hub_cards"
COLOURS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Images of colours at several sizes, in folders, beside files that are none."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "deep/er").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number, (name, colour) in enumerate(COLOURS.items()):
        pixels = np.clip(np.array(colour) + generator.integers(-20, 20, (40 + number, 50, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(root / ("deep/er" if name == "blue" else "") / f"{name}.png")
    (root / "broken.jpg").write_bytes(b"no image at all")
    (root / "empty.png").write_bytes(b"")
    (root / "notes.txt").write_text("no image")
    return root


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("place", ["run", "run/model", "local-dir:run/model"])
def test_a_run_by_each_of_its_names(place, run_folder, pictures, capsys, monkeypatch):
    kind, _, rest = place.rpartition(":")
    model = f"{kind}{':' if kind else ''}{run_folder}{rest.removeprefix('run')}"
    files = [pictures / "deep", pictures / "red.png", pictures / "green.png", pictures / "red.png"]
    assert main(["predict", *map(str, files), "--model", model, "--json", "--top", "2"]) == 0
    out, err = capsys.readouterr()
    found = lines(out)
    order = [pictures / "deep/er/blue.png", *files[1:]]
    assert [line["file"] for line in found] == [str(path) for path in order]
    assert "resnet18_sugar_bsilu, SUGAR bsilu 1.67, 3 classes, 32 px" in err
    network = timm.create_model(f"local-dir:{run_folder}/model", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(network.pretrained_cfg))
    names = json.loads((run_folder / "model/config.json").read_text())["label_names"]
    for line, path in zip(found, order, strict=True):
        with torch.no_grad():
            expected = network(transform(Image.open(path).convert("RGB"))[None])[0].softmax(0)
        assert [one["number"] for one in line["classes"]] == expected.topk(2).indices.tolist()
        assert [one["name"] for one in line["classes"]] == [names[one["number"]] for one in line["classes"]]
        assert [one["probability"] for one in line["classes"]] == pytest.approx(expected.topk(2).values, abs=1e-5)


def test_files_that_cannot_be_read_are_named_and_the_rest_goes_on(run_folder, pictures, capsys):
    assert main(["predict", str(pictures), "--model", str(run_folder), "--json"]) == 1
    out, err = capsys.readouterr()
    found = lines(out)
    names = ["broken.jpg", "deep/er/blue.png", "empty.png", "green.png", "red.png"]
    assert [line["file"] for line in found] == [str(pictures / name) for name in names]
    broken = "cannot be decoded: it is not in a format that Pillow reads"
    assert [line.get("error") for line in found] == [broken, None, "cannot be decoded: it is empty", None, None]
    assert ["classes" in line for line in found] == [False, True, False, True, True]
    assert err.splitlines()[1:] == [
        f"timm-sugar predict: {pictures}/broken.jpg {broken}",
        f"timm-sugar predict: {pictures}/empty.png cannot be decoded: it is empty",
        "timm-sugar predict: error: 2 of 5 files gave no class",
    ]
    assert main(["predict", str(pictures / "notes.txt"), "--model", str(run_folder)]) == 1  # named, so it is tried
    out, err = capsys.readouterr()
    assert out == ""
    assert "notes.txt cannot be decoded" in err
    assert "1 of 1 files" in err


def test_text_for_people(run_folder, pictures, capsys):
    assert main(["predict", str(pictures / "red.png"), "--model", str(run_folder), "--top", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    file, _, rest = line.partition(": ")
    assert file == str(pictures / "red.png")
    name, percent = rest.split()
    assert name in COLOURS
    assert 33 <= float(percent.removesuffix("%")) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png"], "there is no file or folder nowhere.png"),
        (["."], "the folder . holds no images"),
        (["--top", "0"], "top must be at least 1, got 0"),
        (["--model", "nothing"], "there is no folder nothing"),
        (["--model", "local-dir:nothing"], "there is no folder nothing"),
    ],
)
def test_bad_input_is_one_line_before_any_work(arguments, message, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = arguments if not arguments[0].startswith("-") else [str(pictures / "red.png"), *arguments]
    model = [] if "--model" in arguments else ["--model", "unneeded"]
    assert main(["predict", *images, *model]) == 1
    assert capsys.readouterr().err == f"timm-sugar predict: error: {message}\n"


def test_batches_do_not_change_what_comes_out(pictures):
    network = timm_sugar.create_model("resnet18_cifar_sugar_bsilu", channels=(8, 8, 8, 8)).eval()
    files = [str(path) for path in sorted(pictures.rglob("*.*g"))]
    whole, single = (list(predict(network, files, 3, size)) for size in (64, 1))
    assert [(p.file, p.error, [c[:2] for c in p.classes]) for p in whole] == [
        (p.file, p.error, [c[:2] for c in p.classes]) for p in single
    ]


def test_logits_that_are_not_finite_are_no_classes(pictures):
    network = timm_sugar.create_model("resnet18_cifar_sugar_bsilu", channels=(8, 8, 8, 8))
    torch.nn.init.constant_(network.fc.bias, float("nan"))
    (found,) = predict(network, [str(pictures / "red.png")])
    assert (found.classes, found.error) == ((), "cannot be classified: the network's logits are not finite")


def test_names_of_classes():
    network = timm.create_model("test_resnet")
    assert class_names(network)[:2] == ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    assert ", 1000 classes under the names of ImageNet, " in summary_line(network)  # it has none of its own
    few = timm.create_model("test_resnet", num_classes=3)
    assert class_names(few) == ["0", "1", "2"]
    assert ", 3 classes, " in summary_line(few)
    network.pretrained_cfg["label_names"] = ["ant", "bee"]
    with pytest.raises(ValueError, match=r"has 1000 classes, and its config\.json names 2"):
        class_names(network)
    with pytest.raises(ValueError, match="has no classes"):
        class_names(timm.create_model("test_resnet", num_classes=0))


def test_on_a_terminal_the_bar_is_beside_what_is_redirected(run_folder, pictures, tmp_path):
    command = [sys.executable, "-m", "timm_sugar.cli", "predict", str(pictures / "red.png"), "--model", str(run_folder)]
    ours, theirs = pty.openpty()
    with (tmp_path / "out.jsonl").open("wb") as out:
        done = subprocess.Popen([*command, "--json"], stdout=out, stderr=theirs)
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # what Linux says at the end
            pass
    assert done.wait() == 0
    assert b"100%" in shown
    assert [line["file"] for line in lines((tmp_path / "out.jsonl").read_text())] == [str(pictures / "red.png")]


@pytest.mark.parametrize("model", ["lab/net", "hf-hub:lab/net", "hf-hub:lab/net@main"])
def test_a_repository(model, hub, cli, run_folder, pictures, capsys):
    assert cli("publish", run_folder, "--repo-id", "lab/net").status == 0
    result = cli("predict", pictures / "red.png", "--model", model, "--json")
    assert result.status == 0, result.err
    assert main(["predict", str(pictures / "red.png"), "--model", str(run_folder), "--json"]) == 0
    assert lines(result.out) == lines(capsys.readouterr().out)


def test_a_tag(pictures, tmp_path, monkeypatch, capsys):
    (tmp_path / "resnet18_cifar_sugar_bsilu.mine").symlink_to(HUB_CARDS / "resnet18_cifar_sugar_bsilu.cifar10")
    monkeypatch.setenv("TIMM_SUGAR_HUB", str(tmp_path))
    assert main(["predict", str(pictures), "--model", "resnet18_cifar_sugar_bsilu.mine", "--top", "1"]) == 1
    out, err = capsys.readouterr()
    assert "resnet18_cifar_sugar_bsilu, SUGAR bsilu 1.67, 10 classes, 32 px" in err
    assert len(out.splitlines()) == 3
