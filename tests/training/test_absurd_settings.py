"""Absurd values of every setting: each is refused in one line before training, or the run takes it."""

import dataclasses
import json
import sys
import typing

import pytest

from timm_sugar.settings import TrainConfig, all_settings, setting_types, without_none
from timm_sugar.training import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:no (training|validation) image"),
    pytest.mark.filterwarnings("ignore:this CPU has no instructions"),
]
SMALL = dict(
    limit_train="24", limit_val="20", img_size="16", batch_size="8", epochs="2", workers="0", sched="cosine",
    model_args="channels=[4,4,4,4]",
)  # fmt: skip
VALUES = {
    int: ["-1", "0", "1", "2.5", "nan", "x", "", "999999999999999999999999"],
    float: ["-1", "0", "1", "1e-300", "1e308", "nan", "-inf", "x", ""],
    str: ["", " ", "x", "none", "x" * 5000],
    typing.Literal: ["x", ""],
}
ELSEWHERE = ("eval_only", "dry_run", "compile", "push_to_hub", "resume")  # another program, or another machine
REFUSED = [
    "--model-args drop_path_rate=2", "--model-args drop_path_rate=-1", "--model-args drop_rate=x",
    "--model-args channels=[8]", "--model-args channels=8", "--model-args channels=[0,0,0,0]",
    "--model-args features_only=true", "--model-args num_classes=3", "--model-args in_chans=1",
    "--model-args global_pool=x", "--model-args layers=[0,0,0,0]", "--model-args layers=3", "--model-args block=x",
    "--model-args output_stride=3", "--model-args save=x", "--model-args pretrained_cfg=x", "--model-args 1=2",
    "--model-args checkpoint_path=/x", "--model-args x", "--model-args =",
    "--model resnet18_sugar_bsilu.nosuch", "--lr 1e308", "--crop-pct 0.0001", "--opt adahessian", "--opt x",
    "--std 0 0 0", "--std -1 -1 -1", "--std 1", "--mean nan 0 0", "--mean 1e308 0 0", "--decay-rate -1",
    "--weight-decay 1e308", "--warmup-lr 1e308", "--min-lr 1e308", "--opt adamw --opt-betas 1 1",
    "--opt adamw --opt-eps 1e308", "--alpha 1e308", "--alpha-schedule linear --alpha-end 1e308", "--alpha 1e6",
    "--auto-augment x", "--auto-augment rand-x5", "--color-jitter 1e308", "--mixup 1e308", "--cutmix -1",
    "--push-to-hub=", "--push-to-hub x/y/z", "--resume=", "--data=", "--data ./x", "--surrogate=",
    "--milestones 0", "--milestones 1.5", "--seed -1", "--img-size 100000000", "--workers 99999999",
]  # fmt: skip


def _start(monkeypatch, capsys, folder, argv):
    """Run the program as far as `--dry-run` goes, two steps and an evaluation; return its status and what it prints."""
    output = [] if any(flag.startswith("--output") for flag in argv) else ["--output", str(folder / "run")]
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    monkeypatch.setattr(sys, "argv", ["digits.py", *small[:-1], "--model-args", SMALL["model_args"], *output, *argv])
    monkeypatch.chdir(folder)
    capsys.readouterr()
    try:
        main("digits.py", "text", "digits")
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


def _problem(status, out, err):
    """Return what is wrong with an answer, "" for nothing."""
    if status == 0:
        return "" if json.loads(out)["steps_per_epoch"] >= 1 else "no steps"
    lines = err.splitlines()
    one_line = (
        len(lines) == 1 and lines[0].startswith("digits.py: error: ") and len(lines[0]) > len("digits.py: error: x")
    )
    return "" if status == 2 and out == "" and one_line else f"status {status}: {err}"


@pytest.mark.parametrize("flags", REFUSED)
def test_absurd_values_are_refused_in_one_line(flags, tmp_path, monkeypatch, capsys):
    status, out, err = _start(monkeypatch, capsys, tmp_path, [*flags.split(), "--dry-run"])
    assert (status, _problem(status, out, err)) == (2, ""), err


@pytest.mark.parametrize("flag", ["--output=", "--output= "])
def test_no_output_is_not_the_current_folder(flag, tmp_path, monkeypatch, capsys):
    status, _, err = _start(monkeypatch, capsys, tmp_path, [flag])
    assert (status, err.startswith("digits.py: error: output must be text that is not empty")) == (2, True)
    assert not list(tmp_path.iterdir())


def _absurd(name):
    """Command lines that give a setting each absurd value of its type."""
    kind, flag = without_none(setting_types()[name]), "--" + name.replace("_", "-")
    origin, length = typing.get_origin(kind), all_settings()[name].length
    if origin is list:
        values = [[value] * (length or 1) for value in VALUES[typing.get_args(kind)[0]]] + [[], ["0.5"] * 7]
        return [[flag, *items] for items in values if not any(item.startswith("-") for item in items)]
    return [[f"{flag}={value}"] for value in VALUES.get(origin or kind, [])]


NAMES = [spec.name for spec in dataclasses.fields(TrainConfig) if spec.name not in ELSEWHERE and _absurd(spec.name)]


@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_every_setting_is_taken_or_refused_in_one_line(name, tmp_path, monkeypatch, capsys):
    problems = {}
    for argv in _absurd(name):
        answer = _start(monkeypatch, capsys, tmp_path, [*argv, "--dry-run"])
        problems |= {str(argv)[:80]: problem} if (problem := _problem(*answer)) else {}
    assert not problems
