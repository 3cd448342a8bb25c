"""Publishing a run to a Hub over HTTP: what goes up, what is checked first, and what happens when things break."""

import re
import shutil

import pytest
import yaml
from safetensors.torch import load_file, save_file

REPO = "lab/resnet18_sugar_bsilu.colours"
FILES = {"README.md", "config.json", "config.yaml", "curves.png", "metrics.jsonl", "model.safetensors"}
RETRYING = r"(HTTP Error \d+|'.*' thrown|Retrying in|Rate limited|Error while downloading|Trying to resume).*"


def one_error(result, status=1):
    """The one line on standard error, apart from the client's own notes of what it retries."""
    assert result.status == status, result.err
    lines = [line for line in result.err.splitlines() if not re.match(RETRYING, line)]
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err
    assert "hf_" not in result.err + result.out
    return lines[0]


def test_everything_in_one_commit(hub, cli, run_folder):
    result = cli("publish", run_folder, "--repo-id", REPO)
    assert (result.status, result.err) == (0, "")
    assert "accuracy on 60 of 60 test images" in result.out
    assert f"published: {hub.endpoint}/{REPO}" in result.out
    assert hub.commits(REPO) == 1
    files = hub.files(REPO)
    assert set(files) - {".gitattributes"} == FILES
    for name in ("config.json", "model.safetensors"):
        assert files[name] == (run_folder / "model" / name).read_bytes()
    assert files["metrics.jsonl"] == (run_folder / "metrics.jsonl").read_bytes()
    assert files["curves.png"].startswith(b"\x89PNG")


def test_nothing_of_the_machine_goes_up(hub, cli, run_folder, parquet_folder):
    cli("publish", run_folder, "--repo-id", REPO)
    for name, content in hub.files(REPO).items():
        for private in (run_folder.parent, run_folder.name, parquet_folder, "/tmp"):
            assert str(private).encode() not in content, name
    settings = yaml.safe_load(hub.files(REPO)["config.yaml"])
    assert settings["data"] == parquet_folder.rpartition("/")[2]
    assert "output" not in settings
    assert settings["versions"]["torch"]


def test_again_makes_no_second_commit(hub, cli, run_folder):
    cli("publish", run_folder, "--repo-id", REPO)
    result = cli("publish", run_folder, "--repo-id", REPO)
    assert result.status == 0
    assert "nothing has changed" in result.out
    assert hub.commits(REPO) == 1
    assert hub.count("PUT", "/lfs/") == 1


def test_other_content_is_named_and_other_weights_removed(hub, cli, run_folder):
    hub.create(REPO)
    weights = {"pytorch_model.bin": b"old", "model-00001-of-00002.bin": b"old"}
    other = weights | {"README.md": b"mine", "notes.txt": b"mine", "train/model.bin": b"mine"}
    hub.add_commit(REPO, "main", other, "other content")
    result = cli("publish", run_folder, "--repo-id", REPO)
    assert (result.status, result.err) == (0, "")
    said = result.out.splitlines()
    assert f"replaces in {REPO}: README.md" in said
    removed = "model-00001-of-00002.bin, pytorch_model.bin"
    assert f"removes other weights from {REPO}: {removed}" in said
    assert hub.commits(REPO) == 2
    assert set(hub.files(REPO)) - {".gitattributes"} == FILES | {"notes.txt", "train/model.bin"}
    again = cli("publish", run_folder, "--repo-id", REPO)
    assert "nothing has changed" in again.out
    assert "replaces" not in again.out


def test_dry_run_sends_nothing(hub, cli, run_folder):
    result = cli("publish", run_folder, "--repo-id", REPO, "--dry-run", HF_TOKEN=None)
    assert result.status == 0, result.err
    assert all(name in result.out for name in FILES)
    assert f"{(run_folder / 'model/model.safetensors').stat().st_size:,}" in result.out
    assert hub.requests == []


def test_private(hub, cli, run_folder):
    assert cli("publish", run_folder, "--repo-id", REPO, "--private").status == 0
    assert hub.repositories[REPO].private
    assert cli("publish", run_folder, "--repo-id", "lab/public").status == 0
    message = one_error(cli("publish", run_folder, "--repo-id", "lab/public", "--private"))
    assert "lab/public exists already, and is public" in message


def test_revision(hub, cli, run_folder):
    for _ in range(2):
        assert cli("publish", run_folder, "--repo-id", REPO, "--revision", "second").status == 0
    assert (hub.commits(REPO, "main"), hub.commits(REPO, "second")) == (0, 1)
    assert "model.safetensors" in hub.files(REPO, "second")


def test_pull_request(hub, cli, run_folder):
    message = one_error(cli("publish", run_folder, "--repo-id", "stranger/net", "--create-pr"))
    assert "no repository stranger/net" in message
    hub.create("stranger/net")
    result = cli("publish", run_folder, "--repo-id", "stranger/net", "--create-pr")
    assert result.status == 0, result.err
    assert f"{hub.endpoint}/stranger/net/discussions/1" in result.out
    assert hub.commits("stranger/net") == 0
    assert "model.safetensors" in hub.files("stranger/net", "refs/pr/1")


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        (None, REPO, "no token for the Hub: set HF_TOKEN"),
        ("hf_wrong", REPO, "does not accept the token"),
        ("hf_reader", "me/net", "the token of me can only read"),
        ("hf_fine", "me/net", "may read me/net, but not write to it"),
        ("hf_other", REPO, "other may not write to lab/"),
        ("hf_good", "club/net", "may read club/net, but not write to it"),
        ("hf_good", "elsewhere/net", "only to me, lab, club"),
    ],
)
def test_tokens(hub, cli, run_folder, token, repo_id, message):
    assert message in one_error(cli("publish", run_folder, "--repo-id", repo_id, HF_TOKEN=token))
    assert hub.repositories == {}


@pytest.mark.parametrize("repo_id", ["net", "lab/../net", "lab/net.git", "lab/a b", "lab/" + "x" * 100, "a/b/c"])
def test_illegal_names(hub, cli, run_folder, repo_id):
    one_error(cli("publish", run_folder, "--repo-id", repo_id))
    assert hub.requests == []


@pytest.mark.parametrize("missing", ["summary.json", "metrics.jsonl", "config.yaml", "model/model.safetensors"])
def test_unfinished_run(hub, cli, run_folder, tmp_path, missing):
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / missing).unlink()
    message = one_error(cli("publish", tmp_path / "run", "--repo-id", REPO))
    assert f"is no finished run: it has no {missing}" in message
    assert hub.requests == []


def test_weights_of_another_run(hub, cli, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    path = tmp_path / "run/model/model.safetensors"
    weights = load_file(path)
    weights["fc.weight"] = -weights["fc.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    assert "the weights are not those of the run" in one_error(cli("publish", tmp_path / "run", "--repo-id", REPO))
    path.write_bytes(path.read_bytes()[:1000])
    one_error(cli("publish", tmp_path / "run", "--repo-id", REPO))
    assert hub.requests == []


def test_a_package_that_others_load_as_another_network(hub, cli, run_folder, parquet_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    config = tmp_path / "run/model/config.json"
    config.write_text(config.read_text().replace('"model_args": {', '"model_args": {"act_layer": "gelu",'))
    for argv in (
        ["publish", tmp_path / "run", "--repo-id", REPO],
        ["verify", tmp_path / "run", "--data", parquet_folder],
    ):
        message = one_error(cli(*argv))
        assert "timm without timm_sugar loads the package as another network: logits differ by" in message
    assert hub.requests == []


def test_data_that_is_not_at_hand(hub, cli, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"data": str(tmp_path / "gone")}))
    result = cli("publish", tmp_path / "run", "--repo-id", REPO)
    assert result.status == 0, result.err
    assert "accuracy not checked" in result.out
    assert str(tmp_path).encode() not in b"".join(hub.files(REPO).values())


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "whoami"),
        ("POST", "repos/create"),
        ("POST", "validate-yaml"),
        ("POST", "preupload"),
        ("POST", "objects/batch"),
        ("PUT", "/lfs/"),
        ("POST", "/commit/"),
    ],
)
def test_a_busy_server_is_asked_again(hub, cli, run_folder, method, path):
    hub.fail(method, path, 503)
    assert cli("publish", run_folder, "--repo-id", REPO).status == 0
    assert hub.commits(REPO) == 1
    assert hub.count(method, path) == 2


def test_rate_limit(hub, cli, run_folder):
    hub.fail("POST", "/commit/", 429, **{"Retry-After": "0"})
    assert cli("publish", run_folder, "--repo-id", REPO).status == 0
    assert hub.commits(REPO) == 1


def test_a_connection_that_breaks_in_the_upload(hub, cli, run_folder):
    hub.fail("PUT", "/lfs/", "cut")
    assert cli("publish", run_folder, "--repo-id", REPO).status == 0
    assert hub.files(REPO)["model.safetensors"] == (run_folder / "model/model.safetensors").read_bytes()
    assert hub.commits(REPO) == 1


def test_a_refused_upload_is_gone_on_with(hub, cli, run_folder):
    hub.fail("POST", "/commit/", 403)
    one_error(cli("publish", run_folder, "--repo-id", REPO))
    assert hub.commits(REPO) == 0
    assert cli("publish", run_folder, "--repo-id", REPO).status == 0
    assert hub.commits(REPO) == 1
    assert hub.count("PUT", "/lfs/") == 1


def test_a_lost_answer_makes_no_second_commit(hub, cli, run_folder):
    hub.fail("POST", "/commit/", "answer lost")
    assert cli("publish", run_folder, "--repo-id", REPO).status == 0
    assert hub.commits(REPO) == 1
    assert hub.count("POST", "/commit/") == 1


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml"])
@pytest.mark.parametrize("damage", [lambda content: content[:-1] + bytes([content[-1] ^ 1]), None])
def test_what_was_stored_otherwise_than_sent_is_named(name, damage, hub, cli, run_folder):
    def store_otherwise():
        content = hub.files(REPO).pop(name)
        if damage:
            hub.files(REPO)[name] = damage(content)

    hub.fail("POST", "/commit/", lambda: hub.fail("GET", "/tree/", store_otherwise))  # the listing after the commit
    message = one_error(cli("publish", run_folder, "--repo-id", REPO))
    assert message.endswith(f"{REPO} does not hold {name} as sent")


def test_two_publishers_at_once(hub, cli, other_cli, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"epoch": 1', '"epoch":  1'))
    hub.others = []
    hub.fail("POST", "preupload", lambda: hub.others.append(other_cli("publish", tmp_path / "run", "--repo-id", REPO)))
    message = one_error(cli("publish", run_folder, "--repo-id", REPO))
    assert "another commit was made" in message
    assert [other.status for other in hub.others] == [0]
    assert hub.commits(REPO) == 1
    assert hub.files(REPO)["metrics.jsonl"] == metrics.read_bytes()


def test_the_token_is_never_shown(hub, cli, run_folder):
    result = cli("publish", run_folder, "--repo-id", REPO, "--debug", HF_TOKEN="hf_wröng")
    assert result.status == 1
    assert "hf_wr" not in result.err + result.out


def test_a_pull_request_is_not_opened_twice(hub, cli, run_folder):
    hub.create("stranger/net")
    hub.fail("POST", "/commit/", "answer lost")
    message = one_error(cli("publish", run_folder, "--repo-id", "stranger/net", "--create-pr"))
    assert "the upload to stranger/net broke off" in message
    assert hub.count("POST", "/commit/") == 1
