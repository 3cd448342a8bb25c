"""Settings: ranges, kinds, and that a new one is a field and nothing else."""

import dataclasses
import string

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from timm_sugar import settings
from timm_sugar.analysis.report import reproduce_commands
from timm_sugar.analysis.run import read_run
from timm_sugar.settings import TrainConfig, all_settings, names_of, setting, setting_types, to_flags
from timm_sugar.training import config as command_line
from timm_sugar.training import load_config, train

VALUES = st.integers() | st.booleans() | st.text(string.printable + "é𐀀") | st.lists(st.floats(0, 1))
SMALL = dict(limit_train=64, limit_val=20, img_size=16, batch_size=16, epochs=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(epochs=0), r"epochs must be at least 1 and at most 1e\+06, got 0$"),
        (dict(val_fraction=1.0), r"val_fraction must be at least 0 and below 1, got 1.0$"),
        (dict(crop_pct=0.0), r"crop_pct must be at least 0.1 and at most 1, got 0.0$"),
        (dict(crop_pct=1.5), r"crop_pct must be at least 0.1 and at most 1, got 1.5$"),
        (dict(clip_grad=0.0), r"clip_grad must be above 0, got 0.0$"),
        (dict(std=[0.1, 0.0, 0.1]), r"std must be at least 0.001 and at most 1, got 0.0$"),
        (dict(std=[0.1]), r"std must have 3 values, got \[0.1\]$"),
        (dict(decay_rate=-1.0), r"decay_rate must be at least 0 and at most 1000, got -1.0$"),
        (dict(opt_betas=[0.9, 1.0]), r"opt_betas must be at least 0 and below 1, got 1.0$"),
    ],
)
def test_ranges(given, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**given)


def test_the_ends_of_a_range_that_belong_to_it():
    config = TrainConfig(epochs=1, val_fraction=0, crop_pct=1, hflip=1, clip_grad=1e-9, decay_rate=0, memory_limit=0)
    assert (config.epochs, config.val_fraction, config.hflip) == (1, 0.0, 1.0)


def test_every_setting_is_of_one_kind():
    kinds = ("data", "result", "free", "start")
    assert sorted(name for kind in kinds for name in names_of(kind)) == sorted(all_settings())
    assert names_of("start") == ["output", "resume", "push_to_hub", "eval_only", "dry_run"]
    assert {"workers", "memory_limit", "tracker", "checkpoint_steps"} <= {*names_of("free")}


@given(
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.booleans(),
    st.dictionaries(st.text("abc_", min_size=1), VALUES),
    st.text(string.printable, min_size=1).filter(
        lambda text: text.strip() and not text.startswith("-") and text != "none"
    ),
)
def test_flags_give_the_settings_back(mean, compile, model_args, data):
    config = TrainConfig(data=data, mean=mean, compile=compile, model_args=model_args, sched="cosine", output="x")
    argv = ["--recipe", "digits", *to_flags(dataclasses.asdict(config))]
    assert load_config(argv, "prog", "text", "digits") == config


@pytest.fixture
def added(monkeypatch) -> type:
    """TrainConfig with two fields more."""
    fields = [
        ("temperature", float, setting(1.0, "of the softmax", "(0, inf)", group="optimization")),
        ("colour", str, setting("red", "of the bar", group="run", kind="free")),
    ]
    more = dataclasses.make_dataclass("More", fields, bases=(TrainConfig,))
    for module in (settings, command_line):
        monkeypatch.setattr(module, "TrainConfig", more)
    return more


def test_a_new_flag_is_one_field(added, tmp_path, monkeypatch, capsys):
    assert setting_types()["temperature"] is float
    with pytest.raises(SystemExit):
        load_config(["--help"], "prog", "text", "digits")
    shown = capsys.readouterr().out
    assert "--temperature FLOAT" in shown.partition("optimization:")[2].partition("run:")[0]
    assert "--colour STR" in shown.partition("run:")[2]
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        load_config(["--temperature", "0"], "prog", "text", "digits")
    (tmp_path / "r.yaml").write_text("temperature: 2\n")
    assert load_config(["--recipe", str(tmp_path / "r.yaml")], "prog", "text", "digits").temperature == 2.0

    output = tmp_path / "run"
    given = SMALL | dict(model_args={"channels": [8, 8, 8, 8]}, output=str(output))
    train(added(**given, temperature=2.0))
    assert yaml.safe_load((output / "config.yaml").read_text())["temperature"] == 2.0
    card = (output / "model" / "README.md").read_text()
    assert "\ntemperature: 2.0\n" in card
    assert "\ncolour:" not in card
    assert train(added(**given, temperature=2.0, colour="blue"))["epochs"] == 1  # is free between starts
    with pytest.raises(ValueError, match=r"holds a run with temperature=2.0, not 3.0"):
        train(added(**given, temperature=3.0))
    ((_, commands),) = reproduce_commands([read_run(output, "run")])
    assert "\ntemperature: 2.0\n" in commands
