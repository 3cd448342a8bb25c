"""What else a run can do: trackers, dry run, evaluation alone, schedules of the surrogate, bad images, averages."""

import itertools
import json
import runpy
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import image_folder
from timm_sugar.layers import Activation
from timm_sugar.training import TrainConfig, dry_run, processes, tracking, train
from timm_sugar.training.checkpoint import State, latest_checkpoint, read_checkpoint
from timm_sugar.training.schedules import activation_at
from timm_sugar.training.train import build, train_steps

LOOP = sys.modules["timm_sugar.training.train"]  # the function has the same name
SMALL = {"channels": [8, 8, 8, 8]}


def _config(output, **settings):
    defaults = dict(limit_train=64, limit_val=20, img_size=16, batch_size=16, epochs=1, model_args=SMALL)
    return TrainConfig(**{"data": "digits"} | defaults | {"output": str(output)} | settings)


def _lines(output):
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def _weights(output):
    return load_file(Path(output) / "model" / "model.safetensors")


def test_alpha_and_surrogate_over_time(tmp_path):
    change = dict(alpha_schedule="linear", alpha_end=0.67, switch_epoch=4, switch_surrogate="nelu", switch_alpha=0.05)
    summary = train(_config(tmp_path / "a", epochs=4, val_fraction=0, limit_val=None, **change))
    seen = [(line["surrogate"], line["alpha"]) for line in _lines(tmp_path / "a")]
    assert seen == [("bsilu", 1.67), ("bsilu", pytest.approx(1.17)), ("bsilu", 0.67), ("nelu", 0.05)]
    assert (summary["surrogate"], summary["alpha"]) == ("nelu", 0.05)
    train(_config(tmp_path / "b", epochs=4, val_fraction=0, limit_val=None))
    assert any(not torch.equal(w, _weights(tmp_path / "b")[name]) for name, w in _weights(tmp_path / "a").items())


def test_channels_last_trains_what_channels_first_does(tmp_path):
    first, last = (build(_config(tmp_path / f"{flag}", channels_last=flag)) for flag in (False, True))
    assert not first.network.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert last.network.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    losses = [[loss.item() for loss, *_ in train_steps(run, State())] for run in (first, last)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert all(w.is_contiguous() for w in last.evaluated.state_dict().values())


def test_cosine_of_alpha():
    config = _config("unused", epochs=5, alpha_schedule="cosine", alpha_end=0.0)
    alphas = [activation_at(config, epoch, Activation("bsilu", 2.0)).alpha for epoch in range(1, 6)]
    assert alphas == pytest.approx([2.0, 1 + 2**-0.5, 1.0, 1 - 2**-0.5, 0.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(act_layer="relu", alpha_schedule="linear", alpha_end=1.0), "need a network with SUGAR activations"),
        (dict(surrogate="gelu", alpha_schedule="linear", alpha_end=1.0), "surrogate 'gelu' has no alpha"),
        (dict(epochs=2, switch_epoch=2, switch_surrogate="nelo"), "unknown surrogate 'nelo'; did you mean 'nelu'"),
        (dict(model_args=SMALL | {"num_classes": 7}), "data set 'digits' has 10 classes, the model 7"),
        (dict(sync_bn=True), "sync_bn needs GPUs: SyncBatchNorm does not work on cpu"),
        (dict(limit_train=30, grad_accum=4), "30 training images are fewer than a step takes: batch_size 16 x grad"),
        (dict(auto_augment="rnad-m9"), "auto_augment 'rnad-m9' is not a policy that timm knows"),
        (
            dict(model="vgg16_cifar_sugar_bsilu", model_args={}),
            "does not take images of img_size 16: .* size is too small",
        ),
        (dict(model="vgg99"), "unknown model 'vgg99'; did you mean 'vgg19'"),
        (dict(tracker="wandb"), "tracker wandb is not installed: pip install wandb"),
    ],
)
def test_refused_before_training(settings, message, tmp_path, monkeypatch):
    monkeypatch.setattr("timm_sugar.training.processes.get_available_trackers", lambda: [])
    with pytest.raises((ValueError, ModuleNotFoundError), match=message):
        train(_config(tmp_path, **settings))
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_tensorboard_gets_the_metrics_and_every_step(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(tracking, "_WINDOW", 3)  # an epoch has four steps
    settings = dict(epochs=2, lr=0.1, sched="cosine", warmup_epochs=0)
    train(_config(tmp_path, tracker="tensorboard", **settings))
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*") if path.parent.name == "timm-sugar"}
    events = EventAccumulator(str(folder))
    events.Reload()
    logged = [event.value for event in events.Scalars("val_top1")]
    assert logged == pytest.approx([line["val_top1"] for line in _lines(tmp_path)])
    assert [event.step for event in events.Scalars("val_top1")] == [4, 8]
    assert [event.value for event in events.Scalars("epoch")] == [1, 2]
    steps, rates = events.Scalars("step_loss"), events.Scalars("step_lr")
    assert [event.step for event in steps] == [event.step for event in rates] == [*range(1, 9)]
    run = build(_config(tmp_path / "again", **settings))
    expected = [loss.item() for epoch in range(2) for loss, *_ in train_steps(run, State(epoch=epoch))]
    assert [event.value for event in steps] == pytest.approx(expected, rel=1e-6)
    assert [event.value for event in rates] == pytest.approx(_rates(run), rel=1e-6)


def test_losses_are_read_from_the_device_a_window_at_a_time(monkeypatch):
    reads, logged = [], []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(len(tensor)) or [*map(float, tensor)])
    monkeypatch.setattr(torch.Tensor, "item", lambda _: pytest.fail("a step waits for the device"))
    accelerator = SimpleNamespace(
        init_trackers=lambda *_: None,
        reduce=lambda t, _: t,
        log=lambda values, step: logged.append((step, values["step_loss"])),
    )
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    tracked, loss = tracking.Tracking(accelerator, "wandb", {}), torch.zeros(())
    for step in range(1, 2 * tracking._WINDOW + 2):
        tracked.step(step, loss, optimizer)
        loss += 1  # in place, as a CUDA graph does
    assert reads == [tracking._WINDOW] * 2
    tracked.flush()
    tracked.flush()
    assert reads == [tracking._WINDOW] * 2 + [1]
    assert logged == [(step, step - 1) for step in range(1, 2 * tracking._WINDOW + 2)]


def _stepping_down(monkeypatch, accuracies):
    """Let the epochs of a run have these accuracies on the validation images."""
    measure, values = LOOP.evaluate_split, iter(accuracies)

    def measured(*arguments):
        found = measure(*arguments)
        return found | {"val_top1": next(values)} if arguments[-1] == "val" else found

    monkeypatch.setattr(LOOP, "evaluate_split", measured)


def test_patience_ends_a_run_after_that_many_epochs_without_a_better_one(tmp_path, monkeypatch, capsys):
    _stepping_down(monkeypatch, [0.1, 0.3, 0.2, 0.3, 0.9])
    summary = train(_config(tmp_path, epochs=9, patience=2))
    assert (summary["trained_epochs"], summary["best_epoch"], summary["epochs"]) == (4, 2, 9)
    assert len(_lines(tmp_path)) == 4
    assert "stopped early: no better validation accuracy since epoch 2\n" in capsys.readouterr().err
    assert train(_config(tmp_path, epochs=9, patience=2)) == summary
    with pytest.raises(ValueError, match="holds a run with patience=2, not 3"):
        train(_config(tmp_path, epochs=9, patience=3))


def test_a_run_killed_after_its_patience_ran_out_trains_no_further(tmp_path, monkeypatch):
    _stepping_down(monkeypatch, [0.3, 0.2, 0.9])
    with monkeypatch.context() as patch:
        patch.setattr(LOOP, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(_config(tmp_path, epochs=9, patience=1))
    summary = train(_config(tmp_path, epochs=9, patience=1))
    assert (summary["trained_epochs"], summary["best_epoch"], summary["val_top1"]) == (2, 1, 0.3)


def test_the_time_counts_validation_and_test(tmp_path, monkeypatch):
    measure = LOOP.evaluate_split

    def slowly(*arguments):
        clock[0] += {"val": 10.0, "test": 100.0}[arguments[-1]]
        return measure(*arguments)

    clock = [0.0]
    monkeypatch.setattr(LOOP, "evaluate_split", slowly)
    monkeypatch.setattr(LOOP.time, "monotonic", lambda: clock[0])
    summary = train(_config(tmp_path, epochs=2))
    assert [line["seconds"] for line in _lines(tmp_path)] == [10.0, 10.0]
    assert summary["seconds"] == 120.0


def test_dry_run_says_what_it_takes_and_writes_nothing(tmp_path, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(
        dry_run.time, "perf_counter", lambda: 8.0 * next(ticks)
    )  # a step takes 8 s, 64 images another 8
    found = train(_config(tmp_path / "run", epochs=7, dry_run=True))
    assert (found["steps_per_epoch"], found["epochs"]) == (4, 7)
    assert found["seconds_per_epoch"] == 4 * 8 + 20 * 8 / 64
    assert found["seconds"] == round(7 * found["seconds_per_epoch"] + 359 * 8 / 64, 1)
    assert found["peak_memory_bytes"] > 2**26
    assert not (tmp_path / "run").exists()
    train(_config(tmp_path / "run", epochs=7))
    used = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors"))
    assert 0.2 * found["disk_bytes"] < used < 1.2 * found["disk_bytes"]


def test_evaluation_alone_repeats_the_measured_accuracy(tmp_path):
    summary = train(_config(tmp_path, epochs=2))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    found = train(_config(tmp_path, epochs=2, eval_only=True))
    assert {name: found[name] for name in ("val_top1", "test_top1", "test_top5", "test_loss")} == {
        name: summary[name] for name in ("val_top1", "test_top1", "test_top5", "test_loss")
    }
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(ValueError, match="do not fit resnet18_sugar_bsilu"):
        train(_config(tmp_path, model_args={"channels": [16] * 4}, eval_only=True))
    with pytest.raises(ValueError, match="holds neither a packaged model nor a checkpoint"):
        train(_config(tmp_path / "empty", eval_only=True))


def test_bad_images_are_named_or_skipped_and_counted(tmp_path):
    data = image_folder(tmp_path / "data", 30, ("train", "test"), corrupt=[("train", 11)])
    settings = dict(data=data, limit_train=None, limit_val=None, batch_size=8)
    with pytest.raises(ValueError, match=r"train/green/11\.png cannot be decoded"):
        train(_config(tmp_path / "a", **settings))
    summary = train(_config(tmp_path / "a", skip_bad_images=True, **settings))
    assert (summary["bad_images"], summary["train_images"] + summary["val_images"]) == (1, 29)


def test_images_that_do_not_fit_into_memory_give_the_same_result(tmp_path):
    train(_config(tmp_path / "held", mean=[0.5] * 3, std=[0.25] * 3))
    train(_config(tmp_path / "needed", mean=[0.5] * 3, std=[0.25] * 3, memory_limit=0))
    held, needed = (_weights(tmp_path / name) for name in ("held", "needed"))
    assert all(torch.equal(held[name], needed[name]) for name in held)


def test_the_moving_average_is_what_is_packaged(tmp_path):
    run = build(_config(tmp_path, ema_decay=0.5))
    assert run.evaluated is run.ema.module
    run = build(_config(tmp_path, ema_decay=0.9, lr=0.1, weight_decay=0.0))
    expected = run.network.conv1.weight.detach().clone()
    for _ in train_steps(run, State()):
        expected.lerp_(run.network.conv1.weight.detach(), 0.1)
    assert not torch.allclose(expected, run.network.conv1.weight, atol=1e-4)
    torch.testing.assert_close(run.ema.module.conv1.weight, expected)
    train(_config(tmp_path / "average", ema_decay=0.9, lr=0.1, val_fraction=0, limit_val=None))
    kept = read_checkpoint(latest_checkpoint(tmp_path / "average" / "checkpoints")).optimizer["ema"]
    assert torch.equal(_weights(tmp_path / "average")["conv1.weight"], kept["conv1.weight"])


def test_the_best_epoch_is_what_is_packaged(tmp_path):
    """A learning rate that grows a hundredfold late wrecks the network: the last epoch is not the best one."""
    late = dict(sched="multistep", milestones=[4], decay_rate=100.0)
    summary = train(_config(tmp_path, epochs=5, lr=0.03, limit_train=320, limit_val=60, **late))
    accuracies = [line["val_top1"] for line in _lines(tmp_path)]
    assert summary["best_epoch"] == 1 + accuracies.index(max(accuracies)) < 5
    assert max(accuracies) > accuracies[-1]
    found = train(_config(tmp_path, limit_val=60, eval_only=True))
    assert found["val_top1"] == summary["val_top1"] == max(accuracies)


def test_learning_rates_change_at_the_step_they_should(tmp_path):
    """A milestone is the first step of the epoch after it; warm-up is over after its share of the steps."""
    settings = dict(epochs=3, lr=0.1, sched="multistep", milestones=[1, 2])
    run = build(_config(tmp_path, **settings))
    assert _rates(run) == pytest.approx([0.1] * 4 + [0.01] * 4 + [0.001] * 4)
    train(_config(tmp_path, **settings))
    assert [line["lr"] for line in _lines(tmp_path)] == pytest.approx([0.1, 0.01, 0.001])
    run = build(_config(tmp_path / "warm", epochs=2, lr=0.1, sched="cosine", warmup_epochs=0.5, warmup_lr=0.02))
    assert _rates(run)[:3] == pytest.approx([0.02, 0.06, 0.1 * (1 + 0.5**0.5) / 2])  # the cosine began at step 0
    assert _rates(run)[2:] == sorted(_rates(run)[2:], reverse=True)


def _rates(run):
    rates = []
    for step in range(run.config.epochs * run.steps_per_epoch):
        run.scheduler.step_update(step)
        rates.append(run.optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        *(({}, {name: value}) for name, value in dict(
            crop="resized", hflip=0.5, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.9, mixup=0.8,
            cutmix=1.0, smoothing=0.1, alpha=1.0, surrogate="nelu", opt="adamw", lr=0.02, momentum=0.5,
            weight_decay=0.5, clip_grad=0.01, seed=43, split_seed=1, interpolation="nearest", mixed_precision="bf16",
            sched="cosine", grad_accum=2, batch_size=32, model_args=SMALL | {"drop_path_rate": 0.9},
        ).items()),
        ({}, dict(lr_base_batch=64)), ({}, dict(crop="padded")), (dict(crop="resized"), dict(crop="padded")),
        (dict(mixup=0.8), dict(mixup_mode="elem")), (dict(mixup=0.8), dict(mixup_prob=0.0)),
        (dict(mixup=0.8), dict(smoothing=0.3)), (dict(mixup=0.8, cutmix=1.0), dict(mixup_switch_prob=1.0)),
        (dict(opt="adamw"), dict(opt_betas=[0.5, 0.5])), (dict(opt="adamw"), dict(opt_eps=1.0)),
        (dict(weight_decay=0.5), dict(weight_decay_end=0.0)), (dict(re_prob=0.9), dict(re_mode="const")),
        (dict(re_prob=0.9), dict(re_count=3)),
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)  # fmt: skip
def test_every_setting_changes_what_is_trained(settings, change, tmp_path, plain_weights):
    before = _trained(tmp_path, **settings) if settings else plain_weights
    assert not torch.equal(_trained(tmp_path, **settings | change), before)


def _trained(output, **settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no instructions for bf16")
        run = build(_config(output, **dict(lr=0.1, epochs=2, mean=[0.5] * 3, std=[0.3] * 3, workers=0) | settings))
    for _ in train_steps(run, State(epoch=1)):
        pass
    return run.network.conv1.weight.detach()


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory):
    weights = _trained(tmp_path_factory.mktemp("plain"))
    assert torch.equal(weights, _trained(tmp_path_factory.mktemp("again"))), "nothing but the setting may matter"
    return weights


def test_a_precision_that_the_cpu_emulates_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "has_instructions", lambda precision: precision == "no")
    with pytest.warns(UserWarning, match="no instructions for bf16: --mixed-precision no is several times faster"):
        build(_config(tmp_path, mixed_precision="bf16"))
    assert processes.has_instructions("no")


def test_linear_scaling_counts_every_image_of_a_step(tmp_path):
    config = _config(tmp_path, lr=0.4, min_lr=0.04, sched="cosine", lr_base_batch=64, grad_accum=2, warmup_epochs=0)
    run = build(config)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.2)
    assert (run.step_images, run.steps_per_epoch) == (32, 2)
    train(config)
    assert _lines(tmp_path)[-1]["lr"] == pytest.approx((0.2 + 0.02) / 2)  # of the second and last step


def test_accumulation_is_one_larger_batch(tmp_path):
    # A transformer: BatchNorm would see the parts.
    vit = dict(model="vit_tiny_patch16_224", surrogate="nelu", model_args=dict(patch_size=8, depth=2, embed_dim=48))
    for name, batch, parts in (("whole", 16, 1), ("parts", 4, 4)):
        train(_config(tmp_path / name, batch_size=batch, grad_accum=parts, clip_grad=1.0, lr=0.1, **vit))
    whole, parts = (_weights(tmp_path / name) for name in ("whole", "parts"))
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, parts[name], rtol=1e-4, atol=1e-5)


def test_weight_decay_goes_down_a_cosine_and_leaves_the_rest_at_zero(tmp_path):
    from timm_sugar.training.schedules import set_weight_decay

    config = _config(tmp_path, weight_decay=0.1, weight_decay_end=0.02)
    run = build(config)
    for progress, expected in ((0.0, 0.1), (0.5, 0.06), (1.0, 0.02)):
        set_weight_decay(run.config, run.optimizer, progress)
        assert sorted({group["weight_decay"] for group in run.optimizer.param_groups}) == pytest.approx([0, expected])


@pytest.mark.filterwarnings("ignore:check_gradients cannot tell")  # of Conv2NeXt, whose layer scale begins at 1e-6
@pytest.mark.parametrize(
    ("script", "network"),
    [
        ("cifar", ["channels=[8, 8, 8, 8]"]),
        ("conv2next", ["depths=[1, 1, 1, 1]", "dims=[8, 8, 16, 16]"]),
        ("tinyimagenet", ["embed_dim=12", "depths=[1, 1, 1, 1]", "num_heads=[1, 2, 2, 4]"]),
    ],
)
def test_the_script_of_each_experiment_trains_with_its_recipe(script, network, tmp_path, monkeypatch, capsys):
    flags = "--data digits --batch-size 16 --epochs 1 --limit-train 64 --workers 0 --mixed-precision no"
    flags += " --no-compile" if script == "conv2next" else ""
    path = Path(__file__).parents[2] / "train" / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *flags.split(), "--output", str(tmp_path), "--model-args", *network])
    runpy.run_path(str(path), run_name="__main__")
    summary = json.loads(capsys.readouterr().out)
    assert (summary["data"], summary["epochs"], summary["train_images"]) == ("digits", 1, 64)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert len(_lines(tmp_path)) == 1
