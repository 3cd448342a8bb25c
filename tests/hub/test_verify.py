"""Verifying published models, from folders and over HTTP: what agrees, what does not, and what is not what it says."""

import json
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from timm_sugar.hub import check_weights, published_files, verify
from timm_sugar.hub.reload import check_reload
from timm_sugar.metrics import find_metric

from .test_publish import one_error


@pytest.fixture(scope="module")
def files(run_folder):
    return published_files(run_folder, "lab/net")


@pytest.fixture
def published(hub, files, request):
    """Name of a published repository, which no other test has in its cache."""
    repo_id = "lab/" + re.sub(r"\W+", "-", request.node.name).strip("-")
    hub.create(repo_id)
    contents = {name: c.read_bytes() if isinstance(c, Path) else c for name, c in files.items()}
    hub.add_commit(repo_id, "main", contents, "published")
    return repo_id


def test_repository_run_and_folder(cli, published, run_folder, parquet_folder):
    summary = json.loads((run_folder / "summary.json").read_text())
    for model in (published, run_folder, run_folder / "model"):
        result = cli("verify", model, "--data", parquet_folder, "--json")
        assert (result.status, result.err) == (0, "")
        found = json.loads(result.out)
        assert (found["images"], found["holds"]) == (60, True)
        top1, *table = found["claims"]
        assert (top1["place"], top1["claimed"]) == ("model-index", round(summary["test_top1"], 4))
        assert top1["measured"] == summary["test_top1"]
        keys = ["test_top1", "test_top5", "val_top1", "dead_units", "activation_sparsity"]
        assert [row["label"] for row in table] == [find_metric(key).label for key in keys]
        for row, key in zip(table, keys, strict=True):
            assert row["place"] == "table"
            assert row["claimed"] == pytest.approx(summary[key], abs=0.51e-4)
            assert row["measured"] == pytest.approx(summary[key], abs=1e-6)
    assert "60 test images" in cli("verify", run_folder, "--data", parquet_folder).out


def test_progress_is_shown_where_it_is_asked_for(run_folder, parquet_folder, monkeypatch):
    shown = []

    @contextmanager
    def bars(*tasks, every=None):
        shown.extend(tasks)
        yield [lambda *done, task=task: shown.append((task, *done)) for task in tasks]

    monkeypatch.setattr(sys.modules["timm_sugar.hub.verify"], "progress_bars", bars)
    verify(str(run_folder), str(parquet_folder), show_progress=True)
    load, test, tested, val, validated = shown
    assert (load, test, val) == ("loading it as its card says", "test images", "validation images")
    assert tested == ("test images", 60, 60)
    assert (validated[0], validated[1]) == ("validation images", validated[2])
    shown.clear()
    verify(str(run_folder), str(parquet_folder))
    assert shown == []


def test_digits_are_split_as_in_training(cli, tmp_path, run_folder):
    """The card names the split_seed, without which the test images would be others."""
    from timm_sugar.training import TrainConfig, train

    output = tmp_path / "run"
    small = {"channels": [8, 8, 8, 8]}
    settings = dict(model_args=small, epochs=1, limit_train=64, opt="adamw", split_seed=3, output=str(output))
    train(TrainConfig(data="digits", model="resnet18_sugar_bsilu", **settings))
    result = cli("verify", output, "--data", "digits")
    assert result.status == 0, result.err + result.out


def test_a_run_that_was_tested_on_a_sample(tmp_path):
    from timm_sugar.training import TrainConfig, train

    small = {"channels": [8, 8, 8, 8]}
    settings = dict(model_args=small, epochs=1, limit_train=64, limit_test=37, split_seed=3, output=str(tmp_path))
    train(TrainConfig(data="digits", model="resnet18_sugar_bsilu", **settings))
    found = verify(str(tmp_path), "digits")
    assert (found.holds, found.images) == (True, 37)
    assert "accuracy on 37 of 37 test images" in check_weights(tmp_path)


SECOND = """    - type: accuracy
      value: 0.5
      name: accuracy at night
"""
ELSEWHERE = """  - task: {type: image-classification}
    dataset: {type: lab/other, name: other, split: test}
    metrics:
    - {type: accuracy, value: 0.9999, name: accuracy}
"""


FALSE = "does not have what it claims: "
NOT_MEASURED = "claims what could not be measured on this data: "


@pytest.mark.parametrize(
    ("pattern", "instead", "message", "shown"),
    [
        (r"value: [\d.]+", "value: 0.51", FALSE + "top-1 accuracy (model-index)", "51.00"),
        (r"(?<=\n)---\n\n# ", SECOND + "---\n\n# ", FALSE + "accuracy at night (model-index)", "50.00"),
        (r"(?<=\n)---\n\n# ", ELSEWHERE + "---\n\n# ", NOT_MEASURED + "accuracy on other (model-index)", "99.99"),
        (r"test top-1 (.*) \| [\d.]+", r"test top-1 \1 | 12.00", FALSE + "test top-1 accuracy (table)", "12.00"),
        (r"validation (.*) \| [\d.]+", r"validation \1 | 1.00", FALSE + "validation top-1 accuracy (table)", "1.00"),
        (r"dead units \| [\d.]+", "dead units | 77.00", FALSE + "dead units (table)", "77.00"),
        (r"\| dead units", r"| robustness | 99.00% |\n\g<0>", NOT_MEASURED + "robustness (table)", "99.00"),
    ],
    ids=["index", "second", "elsewhere", "test", "validation", "dead", "robustness"],
)
def test_each_false_claim_is_status_1(hub, cli, published, parquet_folder, pattern, instead, message, shown):
    card = hub.files(published)["README.md"].decode()
    boast, claims = re.subn(pattern, instead, card)
    assert claims == 1
    hub.add_commit(published, "main", {"README.md": boast.encode()}, "boast")
    result = cli("verify", published, "--data", parquet_folder)
    assert message in one_error(result)
    assert shown in result.out


def test_revision(hub, cli, published, parquet_folder):
    good = hub.repositories[published].branches["main"][-1].oid
    hub.add_commit(published, "main", {"README.md": None}, "no card")
    assert cli("verify", published, "--data", parquet_folder, "--revision", good).status == 0
    one_error(cli("verify", published, "--data", parquet_folder))


def test_missing_repository(hub, cli, parquet_folder):
    message = one_error(cli("verify", "lab/nothing", "--data", parquet_folder))
    assert f"{hub.endpoint} shows no repository lab/nothing to you" in message
    assert "there is no folder nothing" in one_error(cli("verify", "nothing", "--data", parquet_folder))


def test_a_wrong_token_is_said_to_be_wrong(hub, cli, published, parquet_folder):
    result = cli("verify", published, "--data", parquet_folder, HF_TOKEN="hf_wrong")
    assert "does not accept the token; check HF_TOKEN" in one_error(result)


def test_other_data(cli, published, tmp_path):
    assert "digits has other classes than" in one_error(cli("verify", published, "--data", "digits"))


@pytest.mark.parametrize("name", ["/lfs/", "README.md", "config.json"])
def test_a_corrupted_file(hub, cli, published, parquet_folder, name):
    hub.fail("GET", name, "corrupt")
    assert "is corrupted: it does not have the hash" in one_error(cli("verify", published, "--data", parquet_folder))


def test_a_connection_that_breaks_in_the_download_is_resumed(hub, cli, published, parquet_folder):
    before = hub.count("GET", "/lfs/")
    hub.fail("GET", "/lfs/", "cut")
    assert cli("verify", published, "--data", parquet_folder).status == 0
    assert hub.count("GET", "/lfs/") - before == 2


@pytest.mark.parametrize("name", ["/lfs/", "README.md", "config.json"])
def test_a_busy_server_is_asked_again(hub, cli, published, parquet_folder, name):
    hub.fail("GET", name, 503)
    hub.fail("GET", name, 429, **{"Retry-After": "0"})
    assert cli("verify", published, "--data", parquet_folder).status == 0


def test_paths_of_a_repository_stay_in_the_cache(hub, cli, published, parquet_folder, environment, tmp_path):
    escape = "../" * 8 + "tmp/escaped"
    hub.add_commit(published, "main", {escape: b"x", "pytorch_model.bin": b"x", "run.py": b"x"}, "strange files")
    assert cli("verify", published, "--data", parquet_folder).status == 0
    assert not any("escaped" in path or ".bin" in path or ".py" in path for _, path in hub.requests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timm_sugar": {"architecture": "hf-hub:evil/net"}}, "is no model of timm's registry"),
        ({"timm_sugar": {"architecture": "os.system"}}, "is no model of timm's registry"),
        ({"timm_sugar": {"architecture": ["resnet18"]}}, "architecture is"),
        ({"timm_sugar": 3}, "cannot be used"),
        ({"timm_sugar": {}}, "it has no 'architecture'"),
        ({"timm_sugar": {"architecture": "resnet18", "surrogate": {"a": 1}}}, "surrogate is"),
        ({"model_args": {"checkpoint_path": "evil.pth"}}, "not arguments of a model"),
        ({"model_args": {"pretrained_cfg_overlay": {"file": "evil.pth"}}}, "not arguments of a model"),
        ({"model_args": {"block": "os.system"}}, ""),
    ],
)
def test_a_config_from_elsewhere(cli, run_folder, parquet_folder, tmp_path, change, message):
    shutil.copytree(run_folder / "model", tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert message in one_error(cli("verify", tmp_path / "model", "--data", parquet_folder))


def test_sources_of_weights_in_a_config_are_ignored(cli, run_folder, parquet_folder, tmp_path):
    shutil.copytree(run_folder / "model", tmp_path / "model")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"] |= dict(file="/evil.pth", url="http://evil", custom_load="hf", state_dict={})
    path.write_text(json.dumps(config))
    assert cli("verify", tmp_path / "model", "--data", parquet_folder).status == 0


def test_code_of_a_repository_is_not_run(cli, run_folder, parquet_folder, tmp_path):
    shutil.copytree(run_folder / "model", tmp_path / "model")
    (tmp_path / "model/evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Net: pass\nclass Config: pass\n"
    )
    path = tmp_path / "model/config.json"
    code = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Net"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | code))
    result = cli("verify", tmp_path / "model", "--data", parquet_folder)
    assert result.status in (0, 1)  # transformers may refuse it, or go on without its code
    assert not (tmp_path / "ran").exists()


def test_a_config_as_timm_wrote_it_at_first_is_loaded_back(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    cfg = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    (tmp_path / "config.json").write_text(json.dumps(cfg | {"architecture": "test_resnet", "num_classes": 3}))
    check_reload(tmp_path, model)
    with torch.no_grad():
        model.get_classifier().bias += 1
    with pytest.raises(ValueError, match=r"timm without timm_sugar loads the package as another network: .* by 1"):
        check_reload(tmp_path, model)


def test_of_pickled_weights_only_tensors_are_read(cli, run_folder, parquet_folder, tmp_path):
    shutil.copytree(run_folder / "model", tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    torch.save(load_file(run_folder / "model/model.safetensors"), tmp_path / "model/pytorch_model.bin")
    result = cli("verify", tmp_path / "model", "--data", parquet_folder)
    assert result.status == 0, result.err
    (tmp_path / "model/pytorch_model.bin").write_bytes(b"no pickle")
    error = one_error(cli("verify", tmp_path / "model", "--data", parquet_folder))
    assert "pytorch_model.bin is no file of tensors alone" in error
