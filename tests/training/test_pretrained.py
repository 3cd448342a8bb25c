"""Fine-tuning: where weights come from, what is taken from them, converting, freezing, decay by layer, going on."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

import timm_sugar
from tests.training.test_processes import ENVIRONMENT, LAUNCH, ROOT
from timm_sugar.layers import Sugar
from timm_sugar.settings import to_flags
from timm_sugar.training import TrainConfig, load_config, train
from timm_sugar.training.checkpoint import State
from timm_sugar.training.train import build, fit, train_steps

LOOP = sys.modules["timm_sugar.training.train"]  # the function has the same name
VIT = dict(img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=2)
SAID = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.21, 0.22), interpolation="bilinear", crop_pct=0.9)


def _save(folder: Path, name: str, **arguments) -> Path:
    torch.manual_seed(7)
    model = timm.create_model(name, **arguments)
    with torch.no_grad():
        for tensor in model.state_dict().values():  # what a network begins with, ones and zeros, tells nothing apart
            if tensor.is_floating_point():
                tensor += 0.05 * torch.randn_like(tensor).abs()
    model.pretrained_cfg.update(SAID)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    """A folder that timm saved: a ViT with GELU for 7 classes at 32 px."""
    return _save(tmp_path_factory.mktemp("vit") / "saved", "vit_tiny_patch16_224", num_classes=7, **VIT)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> Path:
    """The same of a ResNet-18 with ReLU for 5 classes."""
    folder = tmp_path_factory.mktemp("resnet") / "saved"
    return _save(folder, "resnet18", num_classes=5, channels=[8, 8, 8, 8])


@pytest.fixture(scope="module")
def run_folder(parquet_folder, tmp_path_factory) -> Path:
    """A finished run with SUGAR, alpha and arguments of its own."""
    output = tmp_path_factory.mktemp("run") / "output"
    model = dict(model="resnet18_cifar_sugar_bsilu", model_args={"channels": [8, 8, 8, 8]}, alpha=1.2)
    train(_config(parquet_folder, output, **model, img_size=24, mean=[0.3] * 3, std=[0.25] * 3))
    return output


def _config(data, output, **settings) -> TrainConfig:
    defaults = dict(epochs=1, batch_size=16, limit_train=64, limit_val=24, limit_test=24, workers=0, val_fraction=0.2)
    return TrainConfig(data=data, output=str(output), **defaults | settings)


def _classifier(name: str) -> bool:
    return name.startswith(("head.", "fc."))


def test_a_folder_gives_the_weights_and_says_how_images_look(vit, parquet_folder, tmp_path, capfd):
    run = build(_config(parquet_folder, tmp_path, pretrained=str(vit)))
    saved, found = load_file(vit / "model.safetensors"), run.network.state_dict()
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved if not _classifier(name))
    assert found["head.weight"].shape == (3, 48)
    config = run.config
    assert (config.model, config.img_size, config.interpolation, config.crop_pct) == (
        "vit_tiny_patch16_224", 32, "bilinear", 0.9,
    )  # fmt: skip
    assert (config.mean, config.std) == ([0.4, 0.5, 0.6], [0.2, 0.21, 0.22])
    assert run.images.data_config["mean"] == (0.4, 0.5, 0.6)
    assert {"model", "img_size", "interpolation", "crop_pct", "mean", "std"} <= set(run.left_open)
    assert not any(isinstance(module, Sugar) for module in run.network.modules())
    line = f"vit_tiny_patch16_224 starts from the weights of local-dir:{vit}, with a new classifier of 3 classes"
    assert capfd.readouterr().err.splitlines() == [line]


@pytest.mark.parametrize("safe", [True, False])
def test_a_network_that_takes_any_size_starts_at_its_own(safe, parquet_folder, tmp_path):
    model = timm.create_model("test_vit", num_classes=7)
    timm.models.save_for_hf(model, tmp_path / "saved", safe_serialization=safe)
    run = build(_config(parquet_folder, tmp_path / "run", model=f"local-dir:{tmp_path}/saved"))
    assert run.config.img_size == 160
    assert torch.equal(run.network.pos_embed, model.pos_embed)


def test_what_transformers_saved_around_a_converted_network(parquet_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmWrapperConfig(architecture="test_vit", num_labels=7)
    model = timm_sugar.convert(transformers.TimmWrapperForImageClassification(config), "nelu", 0.2)
    model.save_pretrained(tmp_path / "saved")
    run = build(_config(parquet_folder, tmp_path / "run", model=f"local-dir:{tmp_path}/saved"))
    assert {(m.surrogate, m.alpha) for m in run.network.modules() if isinstance(m, Sugar)} == {("nelu", 0.2)}
    assert torch.equal(run.network.pos_embed, model.timm_model.pos_embed)


def test_what_is_given_wins(vit, parquet_folder, tmp_path):
    given = dict(mean=[0.1] * 3, std=[0.3] * 3, interpolation="nearest", crop_pct=0.8)
    run = build(_config(parquet_folder, tmp_path, pretrained=f"local-dir:{vit}", **given))
    assert {name: getattr(run.config, name) for name in given} == given


def test_position_embeddings_are_resized(vit, parquet_folder, tmp_path):
    run = build(_config(parquet_folder, tmp_path, pretrained=str(vit), img_size=64))
    expected = timm.create_model(f"local-dir:{vit}", pretrained=True, img_size=64)
    assert run.network.pos_embed.shape == (1, 65, 48)
    assert torch.equal(run.network.pos_embed, expected.pos_embed)
    small = load_file(vit / "model.safetensors")["pos_embed"]
    assert torch.equal(run.network.pos_embed[:, 0], small[:, 0])  # of the class token


def test_convert_keeps_the_weights_and_says_what_it_did(vit, parquet_folder, tmp_path, capfd):
    run = build(_config(parquet_folder, tmp_path, pretrained=str(vit), convert=True))
    plain = build(_config(parquet_folder, tmp_path, pretrained=str(vit), act_layer="relu"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(run.network.eval()(images), plain.network.eval()(images))
    found = {(m.surrogate, m.alpha) for m in run.network.modules() if isinstance(m, Sugar)}
    assert found == {("bsilu", 1.67)}
    assert (
        "vit_tiny_patch16_224: SUGAR bsilu, alpha 1.67, in place of 2 GELU; with GELU gone it is a ReLU network, so "
        "its outputs differ before it is trained\n"
    ) in capfd.readouterr().err
    build(_config(parquet_folder, tmp_path, pretrained=str(vit), convert=True, surrogate="nelu", alpha=0.05))
    assert "SUGAR nelu, alpha 0.05, in place of 2 GELU" in capfd.readouterr().err


def test_converting_a_relu_network_changes_no_output(resnet, parquet_folder, tmp_path, capfd):
    run = build(_config(parquet_folder, tmp_path, pretrained=str(resnet), convert=True))
    plain = build(_config(parquet_folder, tmp_path, pretrained=str(resnet)))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(run.network.eval()(images), plain.network.eval()(images))
    assert "resnet18: SUGAR bsilu, alpha 1.67, in place of 17 ReLU\n" in capfd.readouterr().err


def test_a_run_goes_on_with_its_surrogate_and_keeps_the_classifier_of_the_same_classes(
    run_folder, parquet_folder, tmp_path, capfd
):
    run = build(_config(parquet_folder, tmp_path, pretrained=str(run_folder)))
    saved, found = load_file(run_folder / "model/model.safetensors"), run.network.state_dict()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    assert (run.activation.surrogate, run.activation.alpha) == ("bsilu", 1.2)
    assert (run.config.model, run.config.img_size, run.config.mean) == ("resnet18_cifar_sugar_bsilu", 24, [0.3] * 3)
    assert "their classifier kept" in capfd.readouterr().err


def test_another_classifier_for_as_many_other_classes(run_folder, parquet_folder, tmp_path, monkeypatch):
    source = LOOP.open_source(_config(parquet_folder, tmp_path), warn=False)
    others = dataclasses.replace(source, class_names=("cat", "dog", "owl"))
    monkeypatch.setattr(LOOP, "open_source", lambda *_, **__: others)
    run = build(_config(parquet_folder, tmp_path, pretrained=str(run_folder)))
    saved, found = load_file(run_folder / "model/model.safetensors"), run.network.state_dict()
    assert not torch.equal(found["fc.weight"], saved["fc.weight"])
    assert torch.equal(found["conv1.weight"], saved["conv1.weight"])


def test_sugar_from_the_weights_of_its_relu_twin(resnet, parquet_folder, tmp_path):
    names = dict(model="resnet18_sugar_bsilu", pretrained=f"local-dir:{resnet}")
    run = build(_config(parquet_folder, tmp_path, **names, img_size=32))
    saved, found = load_file(resnet / "model.safetensors"), run.network.state_dict()
    assert all(torch.equal(found[name], saved[name]) for name in saved if not _classifier(name))
    assert run.activation.surrogate == "bsilu"
    with pytest.raises(ValueError, match=r"of local-dir:\S+ are not those of resnet34; tensors \d+ missing \(such as"):
        build(_config(parquet_folder, tmp_path, model="resnet34", pretrained=str(resnet), img_size=32))


@pytest.mark.parametrize("kind", ["safetensors", "timm", "ema"])
def test_a_file_of_weights(kind, vit, parquet_folder, tmp_path):
    saved = load_file(vit / "model.safetensors")
    other = {name: torch.zeros_like(value) for name, value in saved.items()}
    path = tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        path = vit / "model.safetensors"
    elif kind == "timm":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in saved.items()}}, path)
    else:
        torch.save({"state_dict": other, "state_dict_ema": saved}, path)
    given = dict(model="vit_tiny_patch16_224", model_args={k: v for k, v in VIT.items() if k != "img_size"})
    run = build(_config(parquet_folder, tmp_path / "run", initial_checkpoint=str(path), img_size=32, **given))
    found = run.network.state_dict()
    assert all(torch.equal(found[name], saved[name]) for name in saved if not _classifier(name))
    assert (run.config.mean, run.config.crop_pct) == ([0.5] * 3, 0.9)  # timm's for this architecture


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(pretrained="resnet18.nosuch"),
            "cannot start from resnet18.nosuch: timm has no weights of this name; the",
        ),
        (dict(pretrained="resnet18.a1_in1k"), r"cannot start from resnet18.a1_in1k: .*; none of its tags is on this"),
        (dict(pretrained="vgg11.nosuch", model="vgg11"), "there are 'vgg11.tv_in1k'$"),
        (dict(pretrained="resnet18_sugar_bsilu.nosuch"), "No pretrained weights exist for resnet18_sugar_bsilu.nosuch"),
        (dict(pretrained="vgg16_cifar_sugar_bsilu"), "it has none of vgg16_cifar_sugar_bsilu. Train them with"),
        (dict(pretrained="nosuch"), "cannot start from nosuch: there is no folder nosuch$"),
        (dict(pretrained="local-dir:nosuch"), "nosuch is no published model: it has no config.json"),
        (dict(model="resnet18.nosuch"), "unknown tag of resnet18 'nosuch'; valid: a1_in1k, a2_in1k"),
        (dict(model="resnet18.a1_in1k"), "names weights: --pretrained starts from them, --model resnet18 without$"),
        (dict(initial_checkpoint="nosuch.pt", model="resnet18"), "cannot start from nosuch.pt: there is no such file"),
        (
            dict(model="swin_tiny_patch4_window7_224", act_layer="sugar_nelu"),
            r"does not take act_layer sugar_nelu by name \(.*\); --convert --surrogate nelu does$",
        ),
        (dict(model="vgg11", act_layer="sugar_nelu"), "does not take act_layer sugar_nelu by name .*--surrogate nelu"),
        (dict(model="vgg11", act_layer="gelu"), r"\('str' object is not callable\); --convert puts SUGAR in$"),
        (dict(model="resnet18", freeze=["layr1"], img_size=32), "unknown part of the network to freeze: 'layr1'; did"),
        (dict(model="resnet18", freeze=["*"], img_size=32), r"freeze \* leaves nothing to train"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_refused_at_once_in_one_line(settings, message, parquet_folder, tmp_path, monkeypatch):
    monkeypatch.delenv("TIMM_SUGAR_HUB", raising=False)
    monkeypatch.setattr(
        LOOP, "load_images", lambda *_: pytest.fail("images were decoded before the weights were found")
    )
    with pytest.raises(ValueError, match=message) as caught:
        build(_config(parquet_folder, tmp_path, **settings))
    assert len(str(caught.value)) < 450
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(pretrained=True, model=None), "pretrained needs a model, or a source"),
        (dict(model="local-dir:a", pretrained="b"), "model local-dir:a and pretrained b are two sources"),
        (dict(pretrained="a", initial_checkpoint="b"), "pretrained and initial_checkpoint are two sources"),
        (dict(initial_checkpoint="b"), "initial_checkpoint needs a model"),
        (dict(pretrained="a", init="pytorch"), "init pytorch would draw the weights of pretrained anew"),
        (dict(model_args={"pretrained": True}), "model_args cannot hold pretrained: give pretrained itself"),
        (dict(convert=True, act_layer="relu"), "convert puts SUGAR in place of the activations, and act_layer another"),
        (dict(patience=3, val_fraction=0), "patience needs validation images, and val_fraction is 0"),
        (dict(layer_decay=0.0), "layer_decay must be above 0 and at most 1"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_a_file_of_another_network_or_of_code(vit, parquet_folder, tmp_path):
    given = dict(model="vit_tiny_patch16_224", img_size=32)
    with pytest.raises(ValueError, match="does not hold the weights of vit_tiny_patch16_224: Missing key") as caught:
        build(_config(parquet_folder, tmp_path, initial_checkpoint=str(vit / "model.safetensors"), **given))
    assert len(str(caught.value)) < 450
    torch.save({"model": timm_sugar.Sugar()}, tmp_path / "code.pt")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("code.pt", "text.pth"):
        with pytest.raises(ValueError, match=rf"{name}: it is no file of safetensors, nor of tensors alone that torch"):
            build(_config(parquet_folder, tmp_path, initial_checkpoint=str(tmp_path / name), **given))


def test_frozen_parts_stay_as_they_are_with_their_statistics(resnet, parquet_folder, tmp_path, capfd):
    frozen = ["conv1", "bn1", "layer1", "layer2.0.bn1.weight"]
    config = _config(parquet_folder, tmp_path, pretrained=str(resnet), freeze=frozen, lr=0.1, weight_decay=0.1)
    summary = train(config)
    saved, found = (load_file(path / "model.safetensors") for path in (resnet, tmp_path / "model"))
    for name, tensor in found.items():
        if _classifier(name) or name.endswith("num_batches_tracked"):
            continue
        stays = name.startswith(("conv1", "bn1", "layer1")) or name == "layer2.0.bn1.weight"
        assert torch.equal(tensor, saved[name]) == stays, name
    count = sum(found[n].numel() for n in ("conv1.weight", "bn1.weight", "bn1.bias", "layer2.0.bn1.weight"))
    count += sum(v.numel() for n, v in found.items() if n.startswith("layer1") and n.endswith(("weight", "bias")))
    assert summary["parameters"] - summary["trained_parameters"] == count
    line = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("frozen"))
    assert line.startswith("frozen: conv1, bn1, layer1, layer2.0.bn1.weight; ")
    assert line.endswith(f"{summary['trained_parameters']:,} of {summary['parameters']:,} parameters are trained, 6 "
                         "BatchNorm layers keep their statistics")  # fmt: skip


def test_layers_learn_at_rates_that_decay(vit, parquet_folder, tmp_path):
    settings = dict(pretrained=str(vit), opt="adamw", lr=0.01, layer_decay=0.5, weight_decay=0.1, sched="cosine")
    run = build(_config(parquet_folder, tmp_path, **settings, warmup_epochs=0, freeze=["blocks.1"]))
    run.scheduler.step_update(0)
    names = {parameter: name for name, parameter in run.network.named_parameters()}
    rates = {names[p]: group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert not any(name.startswith("blocks.1") for name in rates)
    for name, scale in (("patch_embed.proj.weight", 0.5**3), ("blocks.0.mlp.fc1.weight", 0.5**2), ("norm.weight", 0.5),
                        ("head.weight", 1.0), ("head.bias", 1.0)):  # fmt: skip
        assert rates[name] == pytest.approx(0.01 * scale), name
    decays = {names[p]: group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert (decays["head.weight"], decays["head.bias"], decays["norm.weight"]) == (0.1, 0.0, 0.0)
    fit(run)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    last = 0.01 * (1 + math.cos(math.pi * 3 / 4)) / 2  # of the head, in the last of four steps
    assert json.loads(line)["lr"] == pytest.approx(last)


def test_a_run_that_goes_on_does_not_need_the_weights_again(vit, parquet_folder, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(vit, source)
    settings = dict(pretrained=str(source), convert=True, epochs=2, lr=0.01, opt="adamw", freeze=["patch_embed"])
    whole, parts = (_config(parquet_folder, tmp_path / name, **settings) for name in ("whole", "parts"))
    train(whole)
    with monkeypatch.context() as patch:
        patch.setattr(LOOP.Progress, "epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(parts)
    shutil.rmtree(source)
    summary = train(parts)
    first, second = (Path(config.output) for config in (whole, parts))
    for name in ("model/model.safetensors", "model/config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    record = yaml.safe_load((second / "config.yaml").read_text())
    assert record["weights"]["source"] == summary["pretrained"] == f"local-dir:{source}"
    assert (record["model"], record["mean"]) == ("vit_tiny_patch16_224", [0.4, 0.5, 0.6])
    assert train(parts) == summary
    found = train(_config(parquet_folder, parts.output, **settings, eval_only=True))
    assert found["test_top1"] == summary["test_top1"]
    with pytest.raises(ValueError, match="holds a run with convert=True, not False"):
        train(_config(parquet_folder, parts.output, **settings | {"convert": False}))
    with pytest.raises(ValueError, match=r"cannot start from .*: there is no folder"):
        train(_config(parquet_folder, parts.output, **settings, resume="never"))


def test_a_run_of_drawn_weights_does_not_go_on_as_one_from_weights(run_folder, parquet_folder, tmp_path):
    settings = dict(model="resnet18_cifar_sugar_bsilu", model_args={"channels": [8, 8, 8, 8]}, img_size=24)
    train(_config(parquet_folder, tmp_path, **settings))
    record = yaml.safe_load((tmp_path / "config.yaml").read_text())
    for name in ("pretrained", "convert", "freeze", "layer_decay", "patience"):  # as a version wrote it without them
        del record[name]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(record))
    assert train(_config(parquet_folder, tmp_path, **settings))["epochs"] == 1
    with pytest.raises(ValueError, match="holds a run with pretrained=None, not "):
        train(_config(parquet_folder, tmp_path, **settings, pretrained=str(run_folder)))


def test_a_dry_run_and_the_steps_of_a_converted_network(vit, parquet_folder, tmp_path):
    settings = dict(pretrained=str(vit), convert=True, lr=0.05)
    found = train(_config(parquet_folder, tmp_path / "dry", **settings, dry_run=True))
    assert found["steps_per_epoch"] == 4
    assert not (tmp_path / "dry").exists()
    run = build(_config(parquet_folder, tmp_path, **settings, epochs=3))
    losses = [loss.item() for epoch in range(3) for loss, *_ in train_steps(run, State(epoch=epoch))]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


@pytest.mark.parametrize(
    ("flags", "model", "pretrained", "output"),
    [
        ("--pretrained", "resnet18_sugar_bsilu", "resnet18_sugar_bsilu", "output/digits-resnet18_sugar_bsilu-seed42"),
        ("--model vgg11.tv_in1k --pretrained", "vgg11", "vgg11.tv_in1k", "output/digits-vgg11-seed42"),
        ("--pretrained vgg11.tv_in1k", None, "vgg11.tv_in1k", "output/digits-vgg11.tv_in1k-seed42"),
        ("--model hf-hub:a/b@c", None, "hf-hub:a/b@c", "output/digits-hf-hub-a-b-c-seed42"),
        ("--model vgg11 --pretrained a/b", "vgg11", "a/b", "output/digits-vgg11-seed42"),
        ("", "resnet18_sugar_bsilu", None, "output/digits-resnet18_sugar_bsilu-seed42"),
    ],
)
def test_the_flags_name_a_network_and_its_weights(flags, model, pretrained, output):
    config = load_config(flags.split(), "prog", "text", "digits")
    assert (config.model, config.pretrained, config.output) == (model, pretrained, output)
    assert (config.img_size, config.crop_pct) == (32, None if pretrained else 1.0)


def test_two_processes_fine_tune_and_stop_as_one_does(vit, parquet_folder, tmp_path):
    settings = dict(pretrained=str(vit), convert=True, freeze=["patch_embed"], layer_decay=0.7, patience=1, epochs=6)
    settings |= dict(
        lr=0.05, warmup_epochs=0.0, tracker="tensorboard"
    )  # not Adam, which makes as much of rounding as of gradients
    one = train(_config(parquet_folder, tmp_path / "one", **settings))
    config = _config(parquet_folder, tmp_path / "two", **settings, checkpoint_steps=3)
    flags = to_flags({k: v for k, v in dataclasses.asdict(config).items() if v not in (None, {}, [])})
    flags[flags.index("--batch-size") + 1] = "8"
    command = [*LAUNCH, "-m", "timm_sugar.training", *flags]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("starts from the weights of") == done.stderr.count("stopped early") == 1
    two = json.loads((tmp_path / "two/summary.json").read_text())
    names = ("best_epoch", "trained_epochs", "test_confusion", "test_class_top1", "trained_parameters", "pretrained")
    assert [one[name] for name in names] == [two[name] for name in names]
    assert one["trained_epochs"] < 6
    first, second = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)
    losses = [_tracked(tmp_path / name) for name in ("one", "two")]
    assert len(losses[0]) == 4 * one["trained_epochs"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # the mean over the processes


def _tracked(output: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "timm-sugar"))
    events.Reload()
    return [event.value for event in events.Scalars("step_loss")]
