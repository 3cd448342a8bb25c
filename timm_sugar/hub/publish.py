"""Publish a finished run: the files to upload, the checks before, and a single commit."""

import importlib.util
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import httpx
from huggingface_hub.utils.sha import git_hash
from torch import nn

from ..data import Evaluation, LabelledImages, decode, eval_transform, evaluate_batches, stratified_sample
from ..files import read_lines, read_mapping, to_json, to_yaml, write_file
from ..metrics import METRICS
from ..models import create_model
from ..models._download import check_token, retry
from ..models._weights import WEIGHTS
from .card import dataset_of, model_card, public_data, public_settings, read_facts
from .loading import check_repo_id, load_as_in_training
from .reload import check_reload

# Weights that timm and transformers look for besides or instead of model.safetensors.
_OTHER_WEIGHTS = re.compile(
    r"(pytorch_model|model|tf_model|flax_model|open_clip_(pytorch_)?model)[^/]*"
    r"\.(bin|pth|pt|safetensors|h5|msgpack|index\.json)"
)
_SAMPLE = 1000  # test images for the check of the weights
RUN_FILES = ("summary.json", "metrics.jsonl", "config.yaml")
MODEL_FILES = ("config.json", WEIGHTS, "README.md")


@dataclass(frozen=True)
class Published:
    """URL of a published run, and whether anything changed."""

    url: str
    commit: str
    changed: bool


def model_folder(output: Path) -> Path:
    """Return the folder of config.json and the weights: ``model`` in a run, or `output` if `write_folder` wrote it.

    Raises:
        FileNotFoundError: `output` is neither.
    """
    model = output if (output / WEIGHTS).is_file() else output / "model"
    needed = [output / name for name in RUN_FILES] + [model / name for name in MODEL_FILES]
    missing = [path.relative_to(output).as_posix() for path in needed if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{output} is no finished run: it has no {', '.join(missing)}")
    return model


def published_files(output: Path, repo_id: str, facts: dict[str, Any] | None = None) -> dict[str, bytes | Path]:
    """Return the files to publish of a run: name in the repository -> content or path.

    Args:
        output: Folder of a finished run, or one written by `write_folder`.
        repo_id: ORG/NAME for the card.
        facts: Additional facts for the card, see `timm_sugar.hub.read_facts`.

    Raises:
        FileNotFoundError: the run is not finished.
        ValueError: the name is invalid, or a file of the run is invalid.
    """
    check_repo_id(repo_id)
    model = model_folder(output)
    config, summary = read_mapping(model / "config.json"), read_mapping(output / "summary.json")
    metrics, settings = read_lines(output / "metrics.jsonl"), read_mapping(output / "config.yaml")
    # Training recorded whether ORG/NAME was a local folder, which may no longer exist.
    known = summary["dataset_id"] if "dataset_id" in summary else dataset_of(summary["data"])[0]
    facts = {"dataset": known} | (facts or {})
    public = public_settings(settings, facts["dataset"])
    run = summary | {
        "data": public_data(summary["data"], facts["dataset"]),
        "settings": public,
    }
    drawn = _training_curves(metrics, summary.get("surrogate") or settings.get("act_layer") or "")
    files: dict[str, bytes | Path] = {path.name: path for path in sorted(output.glob("*.png"))}
    if drawn is not None:
        files["curves.png"] = drawn
    card = model_card(config, run, repo_id, facts, curves="curves.png" if "curves.png" in files else None)
    return files | {
        "README.md": card.encode(),
        "config.json": model / "config.json",
        "config.yaml": to_yaml(public).encode(),
        "metrics.jsonl": output / "metrics.jsonl",
        WEIGHTS: model / WEIGHTS,
    }


def _training_curves(lines: list[dict[str, Any]], activation: str) -> bytes | None:
    """Draw loss and accuracy by epoch as PNG; None without matplotlib (extra "report")."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from ..analysis.palette import assign_styles
    from ..analysis.plots import metric_curves

    measured = {key for line in lines for key, value in line.items() if value is not None}
    shown = [metric for metric in METRICS if metric.chart in ("Loss", "Accuracy") and metric.key in measured]
    content = io.BytesIO()
    figure = metric_curves({"": [lines]}, shown, assign_styles([activation]))
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    return content.getvalue()


def write_folder(
    output: Path, repo_id: str, folder: Path, facts: dict[str, Any] | None = None
) -> dict[str, bytes | Path]:
    """Write the files to publish into a folder, with the summary, so that it can be published later.

    Other files in the folder stay, including a facts.yaml with the content of `facts`. See `published_files` for the
    other arguments, the result and the exceptions.
    """
    files = published_files(output, repo_id, facts)
    summary = read_mapping(output / "summary.json")
    dataset_id = (facts or {}).get("dataset", summary.get("dataset_id"))
    summary = public_settings(summary, dataset_id) | {"dataset_id": dataset_id}
    files["summary.json"] = (to_json(summary) + "\n").encode()
    there = folder / "facts.yaml"
    if facts and not (there.is_file() and read_facts(there) == facts):
        if "baseline" in facts:
            baseline = facts["baseline"] | {"data": public_data(facts["baseline"]["data"], facts.get("dataset"))}
            files["baseline.json"] = (json.dumps(baseline, indent=2) + "\n").encode()
            facts = facts | {"baseline": "baseline.json"}
        files["facts.yaml"] = to_yaml(facts).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_file(folder / name, _content(content))
    return files


def _content(file: bytes | Path) -> bytes:
    return file.read_bytes() if isinstance(file, Path) else file


def read_test_images(output: Path, data: str | None = None) -> LabelledImages:
    """Return the test images of a run, from `data`, or from their location in training, without a download then.

    Raises:
        OSError, ValueError, ModuleNotFoundError: they are not available.
    """
    settings = read_mapping(output / "config.yaml")
    if data is None:
        data = settings["data"]
        dataset_id = dataset_of(data)[0]
        if dataset_id and not Path(constants.HF_HUB_CACHE, f"datasets--{dataset_id.replace('/', '--')}").is_dir():
            raise FileNotFoundError(f"{data} is not here, --data may say where it is")
    return load_as_in_training(data, settings).test


def check_weights(output: Path, data: str | None = None) -> str:
    """Check that the weights of a run give the accuracy that its summary records.

    A test set of up to 1000 images must give exactly the recorded accuracy; for a larger one, a sample must agree
    within four standard deviations of the sampling error.

    Args:
        output: Folder of the run.
        data: Current location of the test images; None for that in training, without a download.

    Returns:
        A message with the result.

    Raises:
        ValueError, OSError, RuntimeError: the weights do not load, here or by the libraries on the card, are not
            finite, or do not give the recorded accuracy.
    """
    summary = read_mapping(output / "summary.json")
    folder = model_folder(output)
    model = create_model(f"local-dir:{folder}", pretrained=True).eval()
    if not all(torch.isfinite(tensor).all() for tensor in model.state_dict().values()):
        raise ValueError(f"{folder / WEIGHTS} holds numbers that are not finite")
    check_reload(folder, model)
    try:
        test = read_test_images(output, data)
    except (OSError, ModuleNotFoundError, ValueError) as error:
        if data is not None:
            raise
        return f"accuracy not checked: {error}"
    sample = test.subset(stratified_sample(test.labels, _SAMPLE, 0))
    top1, recorded = evaluate_images(model, sample).top1, summary["test_top1"]
    tolerance = 0.5 / len(sample)
    if len(sample) < len(test):
        tolerance += 4 * math.sqrt(recorded * (1 - recorded) / len(sample))
    found = f"accuracy on {len(sample)} of {len(test)} test images: {100 * top1:.2f}%, recorded {100 * recorded:.2f}%"
    if abs(top1 - recorded) > tolerance:
        raise ValueError(f"the weights are not those of the run: {found}")
    return found


def evaluate_images(model: nn.Module, images: LabelledImages) -> Evaluation:
    """Evaluate a network on images with the transform of its `pretrained_cfg`."""
    cfg: Any = model.pretrained_cfg
    pixels = decode(images, eval_transform(cfg))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    batches = zip(pixels.split(256), torch.from_numpy(images.labels).split(256), strict=True)
    return evaluate_batches(model, batches, cfg["mean"], cfg["std"], shared=False)


def check_destination(repo_id: str, create_pr: bool = False) -> None:
    """Check that the token can write to a repository, which need not exist yet.

    Args:
        repo_id: ORG/NAME.
        create_pr: Only open a pull request, for which any token with write access is sufficient.

    Raises:
        ValueError: the name is invalid.
        PermissionError: there is no token, the Hub rejects it, or it has no write access.
        FileNotFoundError: a pull request needs a repository that exists.
        ConnectionError: the Hub cannot be reached.
        HfHubHTTPError: another error of the Hub, or the Hub stays busy.
    """
    check_repo_id(repo_id)
    if get_token() is None:
        raise PermissionError("no token for the Hub: set HF_TOKEN or run `hf auth login`")
    try:
        me = retry(HfApi().whoami)
    except HfHubHTTPError as error:
        check_token(error)
        raise
    except httpx.TransportError as error:
        raise ConnectionError(f"the Hub at {constants.ENDPOINT} cannot be reached: {error}") from error
    token = me.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise PermissionError(f"the token of {me['name']} can only read; make one that can write")
    if create_pr:
        if not retry(HfApi().repo_exists, repo_id):
            raise FileNotFoundError(f"there is no repository {repo_id} to open a pull request for")
        return
    owner = repo_id.partition("/")[0]
    roles = {me["name"]: "admin"} | {org["name"]: org.get("roleInOrg") for org in me.get("orgs", [])}
    if owner not in roles:
        raise PermissionError(f"{me['name']} may not write to {repo_id}; only to {', '.join(roles)}")
    scoped = token.get("fineGrained", {}).get("scoped")
    writable = scoped is None or any(
        "repo.write" in scope.get("permissions", ()) and scope.get("entity", {}).get("name") in (owner, repo_id)
        for scope in scoped
    )
    if roles[owner] == "read" or not writable:
        raise PermissionError(f"the token of {me['name']} may read {repo_id}, but not write to it")


def publish(
    files: dict[str, bytes | Path],
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    announce: Callable[[str], None] = lambda line: None,
) -> Published:
    """Upload files in one commit, or none if the repository holds them already.

    Large files that an earlier attempt uploaded are not sent again. Other weights in the repository, which a library
    might load instead, are removed in the same commit; all other files stay.

    Args:
        files: See `published_files`.
        repo_id: ORG/NAME; created if it does not exist.
        private: Create a private repository.
        revision: Branch to commit to; created if it does not exist.
        create_pr: Open a pull request instead.
        announce: Called before the upload with a message about the files that are replaced or removed.

    Raises:
        PermissionError, FileNotFoundError, ValueError, ConnectionError: see `timm_sugar.hub.check_destination`.
        FileExistsError: another commit was made meanwhile, or the existing repository is public.
        ConnectionError: the upload was interrupted; another call resumes it.
        OSError: the Hub rejects the upload, or stored different content.
    """
    api = HfApi()
    check_destination(repo_id, create_pr)
    if not create_pr:
        retry(api.create_repo, repo_id, private=private or None, exist_ok=True)
        if private and not retry(api.model_info, repo_id).private:
            raise FileExistsError(f"{repo_id} exists already, and is public")
        if revision:
            retry(api.create_branch, repo_id, branch=revision, exist_ok=True)
    parent = retry(api.model_info, repo_id, revision=revision).sha
    there = _stored_files(api, repo_id, parent)
    replaced = [name for name in sorted(files) if name in there and not _is_same(there[name], files[name])]
    stale = [name for name in sorted(there) if name not in files and _OTHER_WEIGHTS.fullmatch(name)]
    for what, names in (("replaces in", replaced), ("removes other weights from", stale)):
        if names:
            announce(f"{what} {repo_id}: {', '.join(names)}")

    def commit() -> CommitInfo:
        # Built for each attempt, since operations whose files the repository already holds are dropped.
        operations: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        return api.create_commit(
            repo_id,
            operations,
            commit_message="Publish a run of timm-sugar",
            revision=revision,
            parent_commit=parent,
            create_pr=create_pr,
        )

    try:
        info = retry(commit, unsafe=create_pr)
    except HfHubHTTPError as error:
        if error.response.status_code != 412:
            raise
        raise FileExistsError(
            f"another commit was made to {repo_id} meanwhile; look at it and publish again"
        ) from error
    except (httpx.TransportError, RuntimeError) as error:
        reason = error.__cause__ or error
        raise ConnectionError(f"the upload to {repo_id} broke off ({reason}); publish again to go on") from error
    stored = _stored_files(api, repo_id, info.oid)
    wrong = [name for name in sorted(files) if name not in stored or not _is_same(stored[name], files[name])]
    if wrong:
        raise OSError(f"{repo_id} does not hold {', '.join(wrong)} as sent")
    return Published(info.pr_url or f"{api.endpoint}/{repo_id}", info.oid, info.oid != parent)


def _stored_files(api: HfApi, repo_id: str, commit: str | None) -> dict[str, RepoFile]:
    entries = retry(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=commit)))
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _is_same(there: RepoFile, content: bytes | Path) -> bool:
    if there.lfs is None:
        return git_hash(_content(content)) == there.blob_id
    return CommitOperationAdd(there.path, content).upload_info.sha256.hex() == there.lfs.sha256
