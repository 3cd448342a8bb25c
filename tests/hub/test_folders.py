"""Published folders: those of hub_cards/, and a new one from the run to the tag, the Hub and back."""

import importlib
import json
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from timm.models import generate_default_cfgs, register_model

import timm_sugar
from timm_sugar.cli import main
from timm_sugar.hub import published_files, read_facts
from timm_sugar.hub.loading import NamedModel
from timm_sugar.layers import Activation
from timm_sugar.models import _weights, is_own, stock_architecture
from timm_sugar.models._weights import find_weights
from timm_sugar.settings import names_of
from timm_sugar.training import TrainConfig, train

HUB_CARDS = Path(__file__).parents[2] / "hub_cards"
FILES = {"README.md", "config.json", "config.yaml", "curves.png", "facts.yaml", "metrics.jsonl", "model.safetensors"}
FILES |= {"summary.json"}


def check_folder(folder: Path) -> int:
    """Check all that a published folder promises, but for the accuracy itself; return the bytes of its weights."""
    architecture = folder.name.split(".")[0]
    assert is_own(architecture)
    found = {path.name for path in folder.iterdir()}
    assert found - {"baseline.json"} == FILES

    size = (folder / "model.safetensors").stat().st_size
    assert size <= (60e6 if architecture.startswith("swin") else 25e6), f"{folder.name}: {size:,} bytes"
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float16 if tensor.dim() > 1 else torch.float32), name
            assert torch.isfinite(tensor).all(), name

    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "num_classes" not in config["model_args"]
    assert len(config["label_names"]) == config["num_classes"]
    assert config["pretrained_cfg"]["hf_hub_filename"] == "model.safetensors"
    assert config["timm_sugar"]["architecture"] == architecture
    assert config["architecture"] == (stock_architecture(architecture) or architecture)

    summary = json.loads((folder / "summary.json").read_text())
    assert abs(summary["test_top1"] - summary["float32_test_top1"]) <= 0.0005
    assert abs(summary["transformers_test_top1"] - summary["float32_test_top1"]) <= 0.0005
    card = ModelCard.load(folder / "README.md")
    (claim,) = card.data.eval_results
    assert claim.metric_value == round(summary["test_top1"], 4)
    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
    again = published_files(folder, f"timm-sugar/{folder.name}", read_facts(folder / "facts.yaml"))
    assert again["README.md"].decode() == (folder / "README.md").read_text()
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    shown = NamedModel(f"timm-sugar/{folder.name}", "", folder / "README.md").settings()  # as after a download
    assert all(value == settings[name] for name, value in shown.items())
    assert {"data", "split_seed", "val_fraction"} <= shown.keys()
    defaults = asdict(TrainConfig())
    told = {name for name in names_of("data", "result") if settings.get(name, defaults[name]) != defaults[name]}
    assert told <= shown.keys()
    assert not {name for name in names_of("result") if shown.get(name) == defaults[name]} & shown.keys()
    for path in folder.glob("*[!g]"):  # all but the picture
        if path.name != "model.safetensors":
            content = path.read_text()
            assert not any(place in content for place in ("/work", "/home", "/root", "/tmp", "/Users")), path

    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    restored = timm_sugar.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert Activation.of(restored) == Activation(config["timm_sugar"]["surrogate"], config["timm_sugar"]["alpha"])
    x = torch.randn(2, *config["pretrained_cfg"]["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(plain(x), restored(x))
    assert next(plain.parameters()).dtype == torch.float32
    return size


def check_tag(folder: Path, default: bool) -> None:
    """Check that a tag of timm's registry stands for a folder where TIMM_SUGAR_HUB names the one around it."""
    architecture = folder.name.split(".")[0]
    assert folder.name in timm.list_pretrained()
    cfg = timm.get_pretrained_cfg(folder.name)
    config = json.loads((folder / "config.json").read_text())
    assert cfg.hf_hub_id == f"timm-sugar/{folder.name}"
    assert cfg.hf_hub_filename == "model.safetensors"
    assert (cfg.num_classes, cfg.input_size) == (config["num_classes"], tuple(config["pretrained_cfg"]["input_size"]))
    loaded = timm.create_model(folder.name, pretrained=True)
    assert loaded.num_classes == config["num_classes"]
    weights = load_file(folder / "model.safetensors")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights[name].to(tensor.dtype)), name
    if default:
        assert find_weights(architecture, None) == f"local-dir:{folder}"
        assert timm.create_model(architecture, pretrained=True).pretrained_cfg["label_names"] == config["label_names"]


def test_every_folder_of_hub_cards(monkeypatch):
    monkeypatch.setenv("TIMM_SUGAR_HUB", str(HUB_CARDS))
    folders = sorted(path for path in HUB_CARDS.iterdir() if path.is_dir())
    assert sum(map(check_folder, folders)) <= 130e6
    tags = {name for name in timm.list_pretrained() if is_own(name) and "." in name}
    assert tags == {folder.name for folder in folders}
    for folder in folders:
        cfg = timm.get_pretrained_cfg(folder.name)
        check_tag(folder, default=find_weights(folder.name.split(".")[0], None) == f"local-dir:{folder}")
        trained_with = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
        input_of_tag = dict(mean=[*cfg.mean], std=[*cfg.std], interpolation=cfg.interpolation, crop_pct=cfg.crop_pct)
        assert input_of_tag == {key: trained_with[key] for key in input_of_tag}, folder.name


FACTS = "dataset: lab/colours\nlimits: Three colours.\npaper: {top1: 0.8642, where: table 4}\nbaseline: relu.json\n"


@pytest.fixture(scope="module")
def folder(parquet_folder, tmp_path_factory):
    """A network as an entrypoint builds it by itself, trained, and packaged by the command line."""
    root = tmp_path_factory.mktemp("whole-way")
    settings = dict(opt="adamw", lr=0.001, epochs=1, batch_size=48, output=str(root / "run"))
    train(TrainConfig(data=parquet_folder, model="resnet18_sugar_bsilu", **settings))
    (root / "facts.yaml").write_text(FACTS)
    (root / "relu.json").write_text((root / "run/summary.json").read_text())
    folder = root / "hub" / "resnet18_sugar_bsilu.colours"
    repo_id = f"timm-sugar/{folder.name}"
    argv = ["publish", root / "run", "--repo-id", repo_id, "--facts", root / "facts.yaml", "--half"]
    assert main([*map(str, argv), "--to-folder", str(folder)]) == 0
    return folder


@pytest.fixture
def tag(monkeypatch):
    """One more line in default_cfgs, as for a published model."""
    module = importlib.import_module("timm_sugar.models.resnet")
    name = "resnet18_sugar_bsilu"
    lines = {
        f"{name}.colours": module._cfg(hf_hub_id=f"timm-sugar/{name}.colours", num_classes=3, input_size=(3, 32, 32)),
        f"{name}.*": module._cfg(),
    }
    before, published = module.default_cfgs, timm.list_pretrained(f"{name}*")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Overwriting")
        monkeypatch.setattr(module, "default_cfgs", {**before, **generate_default_cfgs(lines)})
        register_model(module.resnet18_sugar_bsilu)
        yield f"{name}.colours"
        monkeypatch.undo()
        register_model(module.resnet18_sugar_bsilu)
    assert timm.list_pretrained(f"{name}*") == published


def test_from_the_run_to_the_tag(folder, tag, parquet_folder, monkeypatch, capsys):
    assert check_folder(folder) < 25e6
    monkeypatch.setenv("TIMM_SUGAR_HUB", str(folder.parent))
    check_tag(folder, default=True)
    other = timm.create_model(tag, pretrained=True, num_classes=7)
    assert other.num_classes == 7
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(other.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"].float())
    plain = timm.create_model("resnet18_sugar_bsilu")  # what it was before there were weights
    assert (plain.num_classes, plain.pretrained_cfg["input_size"]) == (1000, (3, 224, 224))
    assert main(["verify", str(folder), "--data", parquet_folder]) == 0
    assert "60 test images" in capsys.readouterr().out


def test_weights_that_cannot_be_had(tag, monkeypatch):
    monkeypatch.delenv("TIMM_SUGAR_HUB", raising=False)
    monkeypatch.setattr(_weights, "CHECKOUT", HUB_CARDS / "nowhere")  # as in an installed wheel
    with pytest.raises(RuntimeError) as error:  # the tests have no network
        timm.create_model(tag, pretrained=True)
    message = str(error.value)
    assert "\n" not in message
    for part in (f"hf-hub:timm-sugar/{tag} cannot be loaded", f"The tags are {tag}.", "hub_cards", "--model"):
        assert part in message


def test_published_from_the_folder(hub, cli, folder):
    for changed in (True, False):
        result = cli("publish", folder, "--repo-id", "lab/colours")
        assert result.status == 0, result.err
        assert ("nothing has changed" in result.out) == (not changed)
    files = hub.files("lab/colours")
    assert set(files) - {".gitattributes"} == FILES - {"facts.yaml", "summary.json"}
    assert b"hf-hub:lab/colours" in files["README.md"]
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_card_and_facts_of_the_folder(folder):
    card = (folder / "README.md").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert f"in float32 it is {100 * summary['float32_test_top1']:.2f}%" in card
    assert "stored in float16" in card
    assert "| plain ReLU | the paper |" in card
    assert ModelCard(card).data.datasets == ["lab/colours"]
    assert read_facts(folder / "facts.yaml")["baseline"]["data"] == "lab/colours"
    assert summary["data"] == "lab/colours"


def test_half_that_is_not_as_good_is_refused(folder, parquet_folder, tmp_path, monkeypatch, capsys):
    from timm_sugar.hub import float16

    run = folder.parent.parent / "run"
    argv = ["publish", str(run), "--repo-id", "lab/net", "--half", "--to-folder", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(float16, "_to_float16", lambda tensors: tensors | {"fc.weight": -tensors["fc.weight"].half()})
        assert main(argv) == 1
    assert "more than 0.05 points from" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(float16, "load_file", lambda path: {"conv1.weight": torch.full((2, 2), 1e6)})
        assert main(argv) == 1
    assert "conv1.weight has values beyond the range of float16" in capsys.readouterr().err
    assert main([*argv, "--data", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*argv, "--dry-run"]) == 0
    assert "nothing was sent" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
