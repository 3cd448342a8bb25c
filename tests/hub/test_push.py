"""--push-to-hub on a training script: checked before the first step, published after the last."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train/digits.py"
CODE = """
import sys
from timm_sugar.training import main
sys.argv[1:] = {argv!r}
main({script!r}, "", "digits")
"""


def _arguments(output, repo_id):
    argv = ["--epochs", "1", "--limit-train", "64", "--model-args", "channels=[8, 8, 8, 8]", "--output", str(output)]
    return [*argv, "--mixed-precision", "no", "--workers", "0", "--push-to-hub", repo_id]


def _train(cli, output, repo_id, **env):
    return cli.python(CODE.format(argv=_arguments(output, repo_id), script=str(SCRIPT)), **env)


def test_refused_before_the_first_step(hub, cli, tmp_path):
    for repo_id, env, message in (
        ("lab/digits", dict(HF_TOKEN="hf_wrong"), "does not accept the token"),
        ("club/digits", {}, "may read club/digits, but not write to it"),
        ("digits", {}, "a repository is named ORG/NAME"),
    ):
        result = _train(cli, tmp_path / "run", repo_id, **env)
        assert result.status == 2
        assert message in result.err
        assert not (tmp_path / "run/metrics.jsonl").exists()
    assert hub.repositories == {}


def test_published_once_it_is_finished(hub, cli, tmp_path):
    for _ in range(2):  # the second call finds the run finished, and the repository as it is to be
        result = _train(cli, tmp_path / "run", "lab/pushed")
        assert result.status == 0, result.err
    assert hub.commits("lab/pushed") == 1
    weights = (tmp_path / "run/model/model.safetensors").read_bytes()
    assert hub.files("lab/pushed")["model.safetensors"] == weights
    assert b"push_to_hub" not in hub.files("lab/pushed")["config.yaml"]


def test_weights_are_checked_before_they_are_published(hub, cli, tmp_path):
    hub.fail("POST", "/commit/", 403)
    assert _train(cli, tmp_path / "run", "lab/pushed").status == 1  # the run is finished, and not published
    path = tmp_path / "run/model/model.safetensors"
    weights = load_file(path)
    save_file(weights | {"fc.bias": weights["fc.bias"] + 100 * weights["fc.weight"].sum(1)}, path, {"format": "pt"})
    result = _train(cli, tmp_path / "run", "lab/pushed")
    assert "the weights are not those of the run" in result.err
    assert result.status == 2
    assert hub.commits("lab/pushed") == 0


@pytest.mark.slow
def test_two_processes_publish_once(hub, environment, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    environment = environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *_arguments(tmp_path / "run", "lab/two")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert hub.commits("lab/two") == 1
    assert [hub.count("POST", "repos/create"), hub.count("PUT", "/lfs/"), hub.count("POST", "/commit/")] == [1, 1, 1]
    weights = (tmp_path / "run/model/model.safetensors").read_bytes()
    assert hub.files("lab/two")["model.safetensors"] == weights
