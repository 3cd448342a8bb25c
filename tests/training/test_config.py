"""Settings: defaults, recipes, command line, and what is refused."""

import re

import pytest
import yaml

from timm_sugar.settings import TrainConfig
from timm_sugar.training.config import RECIPES, load_config, read_recipe


def _load(*argv, recipe="digits"):
    return load_config([*map(str, argv)], "prog", "text", recipe)


def test_recipe_over_defaults_and_flags_over_recipe(tmp_path):
    (tmp_path / "small.yaml").write_text("epochs: 3\nlr: 1e-2\nmodel_args: {drop_rate: 0.1, global_pool: avg}\n")
    config = _load("--recipe", tmp_path / "small.yaml", "--epochs", "7", "--model-args", "drop_rate=0.5", "x=[1, 2]")
    assert (config.epochs, config.lr, config.batch_size) == (7, 0.01, 128)
    assert config.model_args == {"drop_rate": 0.5, "global_pool": "avg", "x": [1, 2]}
    assert config.output == "output/small-resnet18_sugar_bsilu-seed42"


def test_recipe_by_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 2\nmixed_precision: no\n")  # YAML reads no as false
    config = _load("--recipe", str(path))
    assert (config.epochs, config.mixed_precision) == (2, "no")


def test_activation_on_the_command_line_replaces_the_recipes(tmp_path):
    (tmp_path / "r.yaml").write_text("surrogate: nelu\nalpha: 0.1\n")
    assert _load("--recipe", tmp_path / "r.yaml").alpha == 0.1
    config = _load("--recipe", tmp_path / "r.yaml", "--act-layer", "relu")
    assert (config.surrogate, config.alpha, config.act_layer) == (None, None, "relu")
    config = _load("--recipe", tmp_path / "r.yaml", "--surrogate", "bsilu")
    assert (config.surrogate, config.alpha) == ("bsilu", None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epoch", "3"], "unknown argument '--epoch'; did you mean '--epochs'"),
        (["--recipe", "resnet18_cifar1"], "unknown recipe 'resnet18_cifar1'; did you mean 'resnet18_cifar10'"),
        (["--epochs", "three"], "epochs must be a whole number, got 'three'"),
        (["--epochs", "2.5"], "epochs must be a whole number"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--lr", "nan"], "lr must be a finite number"),
        (["--lr", "-1"], "lr must be at least 0"),
        (["--sched", "cosin"], "unknown sched 'cosin'; did you mean 'cosine'"),
        (["--sched", "multistep"], "needs milestones"),
        (["--val-fraction", "1"], "val_fraction must be at least 0 and below 1"),
        (["--crop-pct", "0"], "crop_pct must be at least 0.1"),
        (["--mean", "0.5"], "mean must have 3 values"),
        (["--model-args", "depth"], "KEY=VALUE"),
        (["--data"], "expected one argument"),
        (["--mixup", "0.8", "--batch-size", "7"], "need an even batch_size, got 7"),
        (["--alpha-end", "2"], "alpha_schedule linear or cosine and alpha_end need each other"),
        (["--switch-epoch", "2"], "switch_epoch and switch_surrogate need each other"),
        (["--switch-epoch", "9", "--switch-surrogate", "nelu", "--epochs", "5"], "from 2 to the number of epochs, 5"),
        (["--weight-decay-end", "0.1"], "weight_decay_end needs a weight_decay above 0"),
        (["--re-prob", "1.5"], "re_prob must be at least 0 and at most 1, got 1.5"),
        (["--recipe", "no/such.yaml"], "recipe file no/such.yaml does not exist"),
        (["--model-args", "channels=[8"], "model_args channels is not valid YAML"),
        (["--dry-run", "--eval-only"], "dry_run and eval_only contradict each other"),
    ],
)
def test_bad_command_line(argv, message):
    with pytest.raises(ValueError, match=message) as caught:
        _load(*argv)
    assert "\n" not in str(caught.value)


def test_unknown_field_of_a_recipe(tmp_path):
    (tmp_path / "typo.yaml").write_text("learning_rat: 1\nlr: 2\n")
    with pytest.raises(ValueError, match="unknown field 'learning_rat'"):
        _load("--recipe", tmp_path / "typo.yaml")
    (tmp_path / "broken.yaml").write_text("mean: [0.5\n")
    with pytest.raises(ValueError, match=r"recipe .*broken.yaml is not valid YAML"):
        _load("--recipe", tmp_path / "broken.yaml")
    (tmp_path / "twice.yaml").write_text("lr: 1\nepochs: 2\nlr: 2\n")
    with pytest.raises(ValueError, match=r"recipe .*twice.yaml is not valid YAML: lr is given twice"):
        _load("--recipe", tmp_path / "twice.yaml")
    (tmp_path / "list.yaml").write_text("- lr\n")
    with pytest.raises(ValueError, match="must be a mapping"):
        _load("--recipe", tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: null\n", "epochs must not be empty"),
        ("epochs: x\n", "epochs must be a whole number, got 'x'"),
        ("epochs: 0\n", "epochs must be at least 1 and at most 1e+06, got 0"),
        ("model_args: [1]\n", "model_args must be KEY=VALUE pairs, got [1]"),
        ("mean: 3\n", "mean must be a list, got 3"),
        ("1: 2\n", "unknown field 1;"),
    ],
)
def test_a_recipe_with_a_wrong_value_is_named(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"recipe {path}: {message}")) as caught:
        _load("--recipe", path, "--epochs", "2")
    assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=re.escape(f"recipe {path} is not valid YAML")):
        _load("--recipe", path)


def test_numbers_in_model_args():
    given = _load("--model-args", "init_values=1e-6", "depth=3", "act_layer=relu", "cfg=[8, M, 2E+3]").model_args
    assert given == {"init_values": 1e-6, "depth": 3, "act_layer": "relu", "cfg": [8, "M", 2000.0]}


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as caught:
        _load("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name in TrainConfig.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in shown


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_recipes_are_valid_and_say_where_numbers_come_from(path):
    TrainConfig(**read_recipe(path.stem))
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert any(re.search(r"train/\w+\.py|timm-sugar \w+", line) for line in lines if line.startswith("#"))
    for line in lines:
        value = yaml.safe_load(line) if line and not line.startswith(("#", " ")) else None
        from_paper = path.stem not in ("digits", "digits_dying", "compare")
        if value and (from_paper or isinstance(next(iter(value.values())), (int, float))):
            assert any(mark in line for mark in ("# paper", "# original code", "# our choice")), line


def _recipe(name):
    return TrainConfig(**read_recipe(name))


@pytest.mark.parametrize(("network", "model"), [("resnet18", "resnet18_cifar"), ("vgg16", "vgg16_cifar")])
@pytest.mark.parametrize(("data", "epochs"), [("cifar10", 50), ("cifar100", 100)])
def test_appendix_b(network, model, data, epochs):
    config = _recipe(f"{network}_{data}")
    assert (config.model, config.data, config.epochs) == (f"{model}_sugar_bsilu", data, epochs)
    assert (config.batch_size, config.val_fraction, config.opt, config.lr) == (128, 0.1, "sgd", 0.001)
    assert (config.sched, config.milestones) == ("multistep", [100])
    assert (config.crop, config.hflip, config.auto_augment, config.mixup, config.re_prob) == ("none", 0.0, None, 0, 0)


@pytest.mark.parametrize("name", ["swin_tiny_tinyimagenet", "conv2next_cifar100"])
def test_augmentation_of_appendices_f_and_g(name):
    config = _recipe(name)
    assert (config.auto_augment, config.color_jitter) == ("rand-m9-mstd0.5-inc1", 0.4)
    assert (config.re_prob, config.re_mode, config.re_count) == (0.25, "pixel", 1)
    assert (config.mixup, config.cutmix, config.mixup_switch_prob, config.mixup_mode) == (0.8, 1.0, 0.5, "batch")
    assert (config.opt, config.opt_betas, config.opt_eps) == ("adamw", [0.9, 0.999], 1e-8)
    assert (config.weight_decay, config.sched, config.warmup_epochs, config.epochs) == (0.05, "cosine", 20, 300)
    assert config.batch_size == 200


def test_appendix_f():
    config = _recipe("swin_tiny_tinyimagenet")
    assert (config.model, config.data, config.alpha) == ("swin_tiny_sugar_nelu", "tiny-imagenet", 0.01)
    assert (config.lr, config.warmup_lr, config.min_lr, config.clip_grad) == (5e-4, 5e-7, 5e-6, 5.0)
    assert (config.val_fraction, config.grad_accum, config.lr_base_batch) == (0.05, 1, 512)


def test_appendix_g():
    config = _recipe("conv2next_cifar100")
    assert (config.model, config.data, config.alpha) == ("conv2next_sugar", "cifar100", 0.1)
    assert (config.lr, config.min_lr, config.grad_accum, config.val_fraction) == (4e-3, 1e-6, 4, 0.0)
    assert (config.crop, config.compile, config.ema_decay) == ("padded", True, 0.9999)


def test_a_short_trial_of_a_recipe_is_not_all_warm_up():
    assert _load("--epochs", "1", recipe="swin_tiny_tinyimagenet").warmup_epochs == pytest.approx(0.1)
    assert _load("--epochs", "1", "--warmup-epochs", "1", recipe="swin_tiny_tinyimagenet").warmup_epochs == 1
    assert _load("--auto-augment", "none", recipe="swin_tiny_tinyimagenet").auto_augment is None
