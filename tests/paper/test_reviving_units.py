"""The script that brings dead units back: both ways from the same weights, the counts, and going on where it was."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from timm_sugar.training.checkpoint import latest_checkpoint, read_checkpoint

ROOT = Path(__file__).parents[2]
FLAGS = "--data digits --seeds 0 --epochs 1 --more-epochs 1 --limit-train 100 --limit-val 50 --width 2 --lr 0.05"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("reviving_units", ROOT / "train" / "reviving_units.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*flags: str) -> None:
        monkeypatch.setattr(sys, "argv", ["reviving_units.py", *flags])
        module.main()

    return run


@pytest.mark.slow
def test_the_script(script, tmp_path, capsys):
    flags = [*FLAGS.split(), "--more-lr", "0.01", "--mixed-precision", "no", "--output", str(tmp_path)]
    script(*flags)
    table = capsys.readouterr().out
    written = json.loads((tmp_path / "revival.json").read_text())
    (record,) = written["seeds"]
    relu, sugar = record["after"]
    assert [found["arm"] for found in (relu, sugar)] == ["relu", "sugar"]
    assert (sugar["summary"]["surrogate"], relu["summary"]["surrogate"]) == ("bsilu", None)
    profiles = {
        arm: json.loads((tmp_path / f"seed0/{arm}-0.01/profiles.json").read_text()) for arm in ("relu", "sugar")
    }
    dead = [layer["dead"] for layer in profiles["relu"]["before"]["layers"]]
    assert sum(dead) > 0
    for found in (relu, sugar):
        rows = found["layers"]
        assert [row["dead_before"] for row in rows] == dead
        assert [row["dead_before"] - row["revived"] + row["died"] for row in rows] == [r["dead_after"] for r in rows]
        after = profiles[found["arm"]]["after"]["layers"]
        assert [row["dead_after"] for row in rows] == [layer["dead"] for layer in after]
        share = sum(row["dead_after"] for row in rows) / sum(row["units"] for row in rows)
        assert share == pytest.approx(found["metrics"][-1]["dead_units"])
        assert f"| {sum(dead):.1f} | {sum(row['revived'] for row in rows):.1f} |" in table
    weights = [
        read_checkpoint(latest_checkpoint(tmp_path / "seed0" / name / "checkpoints")).weights
        for name in ("first", "relu-0.01", "sugar-0.01")
    ]
    name = next(n for n in weights[0] if n.endswith("weight"))
    assert not torch.equal(weights[1][name], weights[2][name])
    assert (tmp_path / "epochs_0.01.png").exists()
    assert (tmp_path / "layers_0.01.pdf").exists()

    config = tmp_path / "seed0" / "sugar-0.01" / "summary.json"
    before = config.stat().st_mtime_ns
    script(*flags)  # nothing is trained again
    assert config.stat().st_mtime_ns == before
    assert json.loads((tmp_path / "revival.json").read_text()) == written
    assert capsys.readouterr().out == table


def test_every_arm_is_checked_before_the_first_is_trained(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        script(*FLAGS.split(), "--more-lr", "0.01", "-1", "--output", str(tmp_path / "out"))
    assert stop.value.code == 2
    assert "lr must be" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wrong_settings_are_one_line(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        script("--data", str(tmp_path / "nothing"), "--mixed-precision", "no", "--output", str(tmp_path / "out"))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not exist" in line
