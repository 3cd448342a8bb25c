"""Training runs on real images: the run's folder, packaging and loading back, resuming, and errors before training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

import timm_sugar
from timm_sugar.data import decode, eval_transform, load_source, normalize
from timm_sugar.training import TrainConfig, main, train

ROOT = Path(__file__).parents[2]
SMALL = {"channels": [16, 16, 16, 16]}


def _config(folder, output, **settings):
    defaults = dict(
        model_args=SMALL, epochs=2, batch_size=32, opt="adamw", lr=0.002, val_fraction=0.2, output=str(output)
    )
    return TrainConfig(data=folder, **defaults | settings)


@pytest.fixture(scope="module")
def finished(parquet_folder, tmp_path_factory):
    """A finished run of a SUGAR ResNet-18 and its summary."""
    output = tmp_path_factory.mktemp("run") / "output"
    return output, train(_config(parquet_folder, output))


def test_it_learns(finished):
    _, summary = finished
    assert summary["test_top1"] > 0.9
    assert (summary["model"], summary["surrogate"], summary["alpha"]) == ("resnet18_sugar_bsilu", "bsilu", 1.67)
    assert summary["train_images"] == 192
    assert summary["best_epoch"] in (1, 2)


def test_run_folder(finished):
    output, summary = finished
    assert json.loads((output / "summary.json").read_text()) == summary
    confusion, by_class = summary["test_confusion"], summary["test_class_top1"]
    assert [*by_class] == ["blue", "green", "red"]
    assert [sum(row) for row in confusion] == [20, 20, 20]
    assert [row[i] / 20 for i, row in enumerate(confusion)] == [*by_class.values()]
    assert sum(by_class.values()) / 3 == pytest.approx(summary["test_top1"])
    assert f"    [{confusion[0][0]}, " in (output / "summary.json").read_text()  # a row of the matrix is a line
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    expected = {"epoch", "train_loss", "val_loss", "val_top1", "lr", "images_per_second", "dead_units", "seconds"}
    assert expected <= set(lines[0])
    assert max(line["val_top1"] for line in lines) == summary["val_top1"]
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["versions"]["torch"] == torch.__version__
    assert config["seed"] == 42
    assert len(config["mean"]) == 3  # as resolved from the images
    assert {path.name for path in (output / "model").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert not list(output.rglob("*.tmp"))


def _test_logits(model, folder):
    data_config = timm.data.resolve_model_data_config(model)
    test = load_source(folder).test
    pixels = decode(test, eval_transform(data_config))
    with torch.no_grad():
        logits = model.eval()(normalize(pixels, data_config["mean"], data_config["std"]))
    return logits, torch.from_numpy(test.labels)


def test_loading_back_gives_the_measured_logits(finished, parquet_folder):
    output, summary = finished
    model = timm.create_model(f"local-dir:{output}/model", pretrained=True)
    assert not any(isinstance(m, timm_sugar.Sugar) for m in model.modules())
    logits, labels = _test_logits(model, parquet_folder)
    assert (logits.argmax(1) == labels).double().mean().item() == summary["test_top1"]
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert loss == pytest.approx(summary["test_loss"], rel=1e-5)
    assert model.pretrained_cfg["label_names"] == ["blue", "green", "red"]


def test_loading_back_with_the_surrogate(finished, parquet_folder):
    output, _ = finished
    model = timm_sugar.create_model(f"local-dir:{output}/model", pretrained=True)
    assert model.act1.surrogate == "bsilu"
    stock = timm.create_model(f"local-dir:{output}/model", pretrained=True)
    assert torch.equal(_test_logits(model, parquet_folder)[0], _test_logits(stock, parquet_folder)[0])
    x = torch.full((4,), -1.0, requires_grad=True)
    model.act1(x).sum().backward()
    assert (x.grad > 0.05).all()
    other = timm_sugar.create_model(f"local-dir:{output}/model", pretrained=True, surrogate="nelu", num_classes=7)
    assert (other.act1.surrogate, other.act1.alpha, other.num_classes) == ("nelu", 0.01, 7)


def test_starting_a_finished_run_again_returns_its_summary(finished, parquet_folder):
    output, summary = finished
    before = (output / "model" / "model.safetensors").stat().st_mtime_ns
    assert train(_config(parquet_folder, output)) == summary
    assert (output / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_a_changed_setting_is_refused_by_name(finished, parquet_folder):
    output, _ = finished
    with pytest.raises(ValueError, match=r"holds a run with lr=0.002, not 0.1; give another --output"):
        train(_config(parquet_folder, output, lr=0.1))


class Interrupted(Exception):
    pass


def test_an_interrupted_run_ends_with_the_same_weights(finished, parquet_folder, tmp_path, monkeypatch):
    from timm_sugar.training.progress import Progress

    whole, summary = finished
    steps = []

    def stop(self, loss, logits, labels, mixed):
        steps.append(loss)
        if len(steps) == 9:  # six steps an epoch: in the middle of the second
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", stop)
        with pytest.raises(Interrupted):
            train(_config(parquet_folder, tmp_path, checkpoint_minutes=0))
    assert not (tmp_path / "summary.json").exists()
    resumed = train(_config(parquet_folder, tmp_path))
    weights, expected = (load_file(path / "model/model.safetensors") for path in (tmp_path, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    timed = {"seconds", "images_per_second", "peak_memory_bytes"}
    for ours, theirs in zip(_lines(tmp_path), _lines(whole), strict=True):
        assert {k: v for k, v in ours.items() if k not in timed} == {k: v for k, v in theirs.items() if k not in timed}
    assert {k: v for k, v in resumed.items() if k not in timed} == {k: v for k, v in summary.items() if k not in timed}


def _lines(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_relu_and_sugar_start_from_the_same_weights(parquet_folder, tmp_path):
    for name, act_layer in (("sugar", None), ("relu", "relu")):
        train(_config(parquet_folder, tmp_path / name, act_layer=act_layer, lr=0.0, epochs=1, limit_train=32))
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("sugar", "relu")]
    for name, tensor in weights[0].items():
        if "running" not in name:
            assert torch.equal(tensor, weights[1][name]), name
    config = json.loads((tmp_path / "relu/model/config.json").read_text())
    assert config["timm_sugar"] == {"architecture": "resnet18_sugar_bsilu", "surrogate": None, "alpha": None}


def test_init_pytorch_is_the_default_of_the_layers_and_kept_out_of_pretrained_weights(parquet_folder, tmp_path):
    for init in ("timm", "pytorch"):
        train(_config(parquet_folder, tmp_path / init, init=init, lr=0.0, epochs=1, limit_train=32))
    weights = [load_file(tmp_path / init / "model/model.safetensors") for init in ("timm", "pytorch")]
    name = "layer4.1.conv2.weight"  # 3x3, 16 to 16 channels: kaiming_normal has 2 / 144, the default 1 / (3 * 144)
    variances = [w[name].var().item() for w in weights]
    assert variances == [pytest.approx(2 / 144, rel=0.1), pytest.approx(1 / 432, rel=0.1)]
    assert yaml.safe_load((tmp_path / "pytorch/config.yaml").read_text())["init"] == "pytorch"
    with pytest.raises(ValueError, match="init pytorch would draw the weights of pretrained anew"):
        _config(parquet_folder, tmp_path, init="pytorch", pretrained=True, model="resnet18")
    with pytest.raises(ValueError, match="holds a run with init=pytorch, not timm"):
        train(_config(parquet_folder, tmp_path / "pytorch", lr=0.0, epochs=1, limit_train=32))


def test_without_validation_the_last_epoch_counts(parquet_folder, tmp_path):
    summary = train(_config(parquet_folder, tmp_path, val_fraction=0.0, epochs=1))
    assert (summary["best_epoch"], summary["val_top1"]) == (None, None)
    assert summary["train_images"] == 240
    assert _lines(tmp_path)[0]["val_loss"] is None


def test_limits_are_stratified(parquet_folder, tmp_path):
    from timm_sugar.training.train import build

    run = build(_config(parquet_folder, tmp_path, limit_train=30, limit_val=9, limit_test=12))
    assert torch.bincount(run.images.train.labels).tolist() == [10, 10, 10]
    assert torch.bincount(run.images.val.labels).tolist() == [3, 3, 3]
    assert torch.bincount(run.images.test.labels).tolist() == [4, 4, 4]
    assert run.images.sizes["test"] == 12


def test_accelerate_launch_says_a_line_an_epoch_without_a_terminal(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"]
    command += [
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "train/digits.py",
        "--limit-train",
        "64",
        "--epochs",
        "1",
    ]
    command += ["--limit-val", "20", "--batch-size", "32", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ)
    assert json.loads(done.stdout) == json.loads((tmp_path / "summary.json").read_text())
    (line,) = [line for line in done.stderr.splitlines() if "Warning" not in line and "warn" not in line]
    shown = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line.startswith(f"epoch 1/1  validation top-1 accuracy {100 * shown['val_top1']:.2f}%  training loss ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--model", "resnet18_sugar_bsily"],
            "unknown model 'resnet18_sugar_bsily'; did you mean 'resnet18_sugar_bsilu'",
        ),
        (["--surrogate", "bsilo"], "unknown surrogate 'bsilo'; did you mean 'bsilu'"),
        (["--recipe", "digit"], "unknown recipe 'digit'; did you mean 'digits'"),
        (["--data", "digit"], "unknown data set 'digit'; did you mean 'digits'"),
        (["--data", "./no/such/folder"], "data folder './no/such/folder' does not exist"),
        (["--label-column", "colour"], "unknown label column 'colour'"),
        (["--surrogate", "nelu", "--act-layer", "relu"], "surrogate and act_layer contradict each other"),
        (["--alpha", "inf"], "alpha must be a finite number"),
        (["--surrogate", "gelu", "--alpha", "1"], "surrogate 'gelu' has no alpha"),
        (["--act-layer", "gelo"], "unknown activation 'gelo'; did you mean 'gelu'"),
        (["--model-args", "depht=3"], "model resnet18_sugar_bsilu does not take these arguments: .*'depht'"),
        (["--opt", "sdg"], "unknown optimizer 'sdg'; did you mean 'sgd'"),
        (["--output", "/proc/nowhere"], "output folder /proc/nowhere cannot be written"),
        (["--resume", "no/such/checkpoint"], "no/such/checkpoint is not a complete checkpoint"),
        (["--no-such-flag"], "unknown argument '--no-such-flag'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, message, parquet_folder, tmp_path, monkeypatch, capsys):
    defaults = ["--data", parquet_folder, "--output", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["digits.py", *defaults, *argv])
    with pytest.raises(SystemExit) as caught:
        main(str(ROOT / "train/digits.py"), "text", "digits")
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    import re

    assert re.search(message, line), line
    assert not (tmp_path / "run" / "config.yaml").exists()
