"""The command line: what it lists, its help, and errors of one line with the right exit status."""

import json
from pathlib import Path

import pytest
import timm

import timm_sugar
from timm_sugar.cli import COMMANDS, main
from timm_sugar.models import is_own


def test_models_as_json(capsys, monkeypatch, tmp_path):
    (tmp_path / "resnet18_sugar_bsilu.digits").mkdir()
    (tmp_path / "resnet18_sugar_bsilu.digits/config.json").write_text("{}")
    monkeypatch.setenv("TIMM_SUGAR_HUB", str(tmp_path))
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {name for name in timm.list_models() if is_own(name)}
    assert rows["conv2next_sugar"]["activation"] == "SUGAR nelu 0.1"
    assert rows["conv2next_base"]["activation"] == "GELU"
    assert rows["resnet18_sugar_bsilu"]["parameters"] == 11689512
    assert rows["resnet18_sugar_bsilu"]["weights"] == {"digits": f"local-dir:{tmp_path}/resnet18_sugar_bsilu.digits"}
    assert rows["vgg16_sugar_bsilu"]["weights"] == {}


def test_models_as_a_table(capsys, monkeypatch):
    monkeypatch.delenv("TIMM_SUGAR_HUB", raising=False)
    assert main(["models"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["model", "parameters", "activation", "weights"]
    rows = [line.split() for line in lines]
    folder = Path(__file__).parents[1] / "hub_cards/resnet18_sugar_bsilu.cifar10"
    assert ["resnet18_sugar_bsilu", "11,689,512", "SUGAR", "bsilu", "1.67", "cifar10", f"({folder})"] in rows
    assert ["vgg16_sugar_bsilu", "138,357,544", "SUGAR", "bsilu", "1.67", "-"] in rows


def test_bench_as_json_and_as_a_table(capsys):
    argv = ["bench", "resnet18_sugar_bsilu", "--img-size", "16", "--batch-size", "2", "--rounds", "1"]
    assert main([*argv, "--only", "gelu", "sugar_uint4", "--json"]) == 0
    rows = {row.pop("activation"): row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == ["relu", "gelu", "sugar_uint4"]
    kept = {name: row["saved_vs_relu"] for name, row in rows.items()}
    assert kept["relu"] < kept["sugar_uint4"] < kept["gelu"]
    assert main([*argv, "--only", "sugar"]) == 0
    head, relu, sugar = capsys.readouterr().out.splitlines()
    assert (head.split()[0], relu.split()[0], sugar.split()[0]) == ("activation", "relu", "sugar")
    assert float(relu.split()[3]) == 1
    assert main(["bench", "resnet18_sugar_bsilu", "--rounds", "0"]) == 1
    assert "rounds must be at least 1, got 0" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"timm-sugar {timm_sugar.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"example: timm-sugar {name}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("argv", [[], ["nothing"], ["publish", "x"], ["verify", "x"], ["models", "--no-such"]])
def test_usage_errors_are_status_2_and_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, len(err.splitlines())) == (2, "", 1)
    assert "--help" in err


def test_errors_are_status_1_and_one_line_unless_debugged(capsys, tmp_path):
    argv = ["verify", str(tmp_path), "--data", "digits"]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith("timm-sugar verify: error: ")
    assert "README.md" in err
    assert main([*argv, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_token_is_not_in_errors(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["verify", str(tmp_path / "hf_secret"), "--data", "digits", "--debug"]) == 1
    assert "hf_secret" not in capsys.readouterr().err
