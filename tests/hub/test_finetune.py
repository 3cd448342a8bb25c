"""Training that starts from weights on the Hub: a tag of timm's registry, and a repository."""

import json
from pathlib import Path

import timm
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train/digits.py"
CODE = """
import sys
from timm_sugar.training import main
sys.argv[1:] = {argv!r}
main({script!r}, "", "digits")
"""


def _train(cli, data, output, *flags, **env):
    argv = ["--data", data, "--epochs", "1", "--limit-train", "48", "--batch-size", "16", "--mixed-precision", "no"]
    argv += ["--workers", "0", "--lr", "0", "--output", str(output), *flags]
    return cli.python(CODE.format(argv=argv, script=str(SCRIPT)), **env)


def _publish(hub, repo_id: str, files: dict[str, bytes]) -> str:
    hub.create(repo_id)
    return hub.add_commit(repo_id, "main", files, "weights").oid


def test_a_tag_of_timm(hub, cli, parquet_folder, tmp_path):
    torch.manual_seed(3)
    weights = timm.create_model("test_resnet").state_dict()
    _publish(hub, "timm/test_resnet.r160_in1k", {"model.safetensors": save(weights)})
    for flags in (["--pretrained", "test_resnet.r160_in1k"], ["--model", "test_resnet", "--pretrained", "--convert"]):
        output = tmp_path / flags[1]
        done = _train(cli, parquet_folder, output, *flags, "--img-size", "32")
        assert done.status == 0, done.err
        assert "test_resnet starts from the weights of test_resnet.r160_in1k, with a new classifier of 3" in done.err
        found = load_file(output / "model/model.safetensors")
        same = [name for name in weights if "running" not in name and torch.equal(found[name], weights[name])]
        assert len(same) == sum("running" not in n and "tracked" not in n for n in weights) - 2  # of the classifier
        assert yaml.safe_load((output / "config.yaml").read_text())["mean"] == [0.5] * 3  # timm's, not of these images
        card = ModelCard((output / "model/README.md").read_text())
        assert card.data.get("base_model") == "timm/test_resnet.r160_in1k"


def test_a_tag_that_cannot_be_reached(hub, cli, parquet_folder, tmp_path):
    done = _train(cli, parquet_folder, tmp_path, "--pretrained", "test_vit.r160_in1k")
    assert done.status == 2
    (line,) = [line for line in done.err.splitlines() if line.startswith("digits.py: error")]
    assert "cannot start from test_vit.r160_in1k: " in line
    assert line.endswith("none of its tags is on this machine")
    assert "Traceback" not in done.err


def test_a_repository_to_go_on_with(hub, cli, run_folder, parquet_folder, tmp_path):
    names = ("config.json", "model.safetensors", "README.md")
    commit = _publish(hub, "lab/colours", {name: (run_folder / "model" / name).read_bytes() for name in names})
    done = _train(cli, parquet_folder, tmp_path / "run", "--model", "hf-hub:lab/colours", "--freeze", "bn1", "layer*")
    assert done.status == 0, done.err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["pretrained"] == f"hf-hub:lab/colours@{commit}"
    assert (summary["model"], summary["surrogate"]) == ("resnet18_sugar_bsilu", "bsilu")
    before, after = (load_file(folder / "model/model.safetensors") for folder in (run_folder, tmp_path / "run"))
    names = [name for name in before if "tracked" not in name]
    assert all(torch.equal(after[name], before[name]) for name in names)  # the rate is 0, and every BatchNorm is frozen
    assert ModelCard((tmp_path / "run/model/README.md").read_text()).data.get("base_model") == "lab/colours"
    again = _train(
        cli, parquet_folder, tmp_path / "run", "--model", "hf-hub:lab/colours", "--freeze", "bn1", "layer*",
        HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"),
    )  # fmt: skip
    assert again.status == 0, again.err
    assert json.loads(again.out) == summary
