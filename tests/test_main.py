"""``python -m timm_sugar SCRIPT``: the script runs as if started by itself, with the models registered."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from timm_sugar.__main__ import main

# What timm's train.py does, in short: parse arguments, create the model by name, two steps, save the state.
TRAIN = """
import argparse, json, sys
import helper
import timm, torch

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--output")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=helper.CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(2):
        loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    acts = sorted({type(m).__name__ for m in model.modules()})
    json.dump({"losses": losses, "argv": sys.argv[1:], "file": __file__, "acts": acts}, open(args.output, "w"))
    sys.exit(7)
"""


def test_two_training_steps_of_a_script(tmp_path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "helper.py").write_text("CLASSES = 5\n")
    (folder / "train.py").write_text(TRAIN)
    output = tmp_path / "out.json"
    args = ["--model", "resnet18_cifar_sugar_bsilu", "--output", str(output)]
    command = [sys.executable, "-m", "timm_sugar", str(folder / "train.py"), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr  # the script's own exit status
    result = json.loads(output.read_text())
    assert result["argv"] == args
    assert Path(result["file"]) == folder / "train.py"
    assert "Sugar" in result["acts"]
    assert len(result["losses"]) == 2
    assert all(0 < loss < 100 for loss in result["losses"])


def test_exceptions_pass_through(tmp_path, monkeypatch):
    (tmp_path / "fails.py").write_text("raise KeyError('mine')\n")
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(KeyError, match="mine"):
        main([str(tmp_path / "fails.py")])


@pytest.mark.parametrize(("argv", "message"), [([], ""), (["missing.py"], "no such script or command: missing.py")])
def test_usage_errors(argv, message, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert message in err
    assert "usage: python -m timm_sugar [--monitor] SCRIPT" in err


def test_a_command_of_timm_sugar(capsys):
    assert main(["models", "--json"]) == 0
    assert "resnet18_sugar_bsilu" in {row["name"] for row in json.loads(capsys.readouterr().out)}
    with pytest.raises(SystemExit) as stopped:
        main(["models", "--jsn"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("timm-sugar: error: unrecognized arguments: --jsn")


def test_help(capsys):
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage:")
