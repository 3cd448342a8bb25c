"""Publishing a finished run: what goes up, the checks before, and the one commit."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx
from torch import nn

from ..data import decode, eval_transform, evaluate, load_source, stratified_sample
from ..files import to_yaml
from ..models import create_model
from ..models._weights import WEIGHTS, file_hash
from .card import dataset_of, model_card, public_settings
from .client import check_destination, check_repo_id, head_of, patiently
from .curves import training_curves

_SAMPLE = 1000  # test images that the weights are checked on
_NEEDED = ("summary.json", "metrics.jsonl", "config.yaml", "model/config.json", f"model/{WEIGHTS}", "model/README.md")


@dataclass(frozen=True)
class Published:
    """Where a run is now: its page, and whether there was anything to change."""

    url: str
    commit: str
    changed: bool


def files_of_run(output: Path, repo_id: str, facts: dict[str, Any] | None = None) -> dict[str, bytes | Path]:
    """Return what is published of a run: content or file, by its name in the repository.

    Args:
        output: Folder of a finished run.
        repo_id: ORG/NAME that the card is written for.
        facts: What the card says besides the numbers, see `timm_sugar.hub.read_facts`.

    Raises:
        FileNotFoundError: the run is not finished.
        ValueError: the name is not legal, or a file is not what a run writes.
    """
    check_repo_id(repo_id)
    missing = [name for name in _NEEDED if not (output / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{output} is no finished run: it has no {', '.join(missing)}")
    try:
        config = json.loads((output / "model/config.json").read_text(encoding="utf-8"))
        summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        settings = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
        # At the end of training it was known whether ORG/NAME is a folder; here it need not be there any more.
        known = ModelCard.load(output / "model/README.md").data.datasets
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{output} cannot be published: {' '.join(str(error).split())}") from error
    facts = {"dataset": known[0] if known else None} | (facts or {})
    public = public_settings(settings, facts["dataset"])
    run = summary | {"settings": to_yaml({k: v for k, v in public.items() if k != "versions"})}
    drawn = training_curves(metrics)
    files: dict[str, bytes | Path] = {path.name: path for path in sorted(output.glob("*.png"))}
    if drawn is not None:
        files["curves.png"] = drawn
    card = model_card(config, run, repo_id, facts, curves="curves.png" if "curves.png" in files else None)
    return files | {
        "README.md": card.encode(),
        "config.json": output / "model/config.json",
        "config.yaml": to_yaml(public).encode(),
        "metrics.jsonl": output / "metrics.jsonl",
        WEIGHTS: output / "model" / WEIGHTS,
    }


def check_weights(output: Path) -> str:
    """Load the weights of a run and make sure that they are those that its accuracy was measured on.

    All of a test set of up to 1000 images must give the recorded accuracy; a sample of a larger one must give it to
    within four standard deviations of what such a sample scatters.

    Returns:
        What was found, for a person to read. Data that is not at hand is not downloaded for it.

    Raises:
        ValueError, OSError, RuntimeError: the weights do not load, give no numbers, or not the recorded accuracy.
    """
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    settings = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
    model = create_model(f"local-dir:{output / 'model'}", pretrained=True).eval()
    if not all(torch.isfinite(tensor).all() for tensor in model.state_dict().values()):
        raise ValueError(f"{output / 'model' / WEIGHTS} holds numbers that are not finite")
    data = settings["data"]
    dataset_id = dataset_of(data)[0]
    if dataset_id and not Path(constants.HF_HUB_CACHE, f"datasets--{dataset_id.replace('/', '--')}").is_dir():
        return f"accuracy not checked: {data} has not been downloaded here"
    try:
        source = load_source(data, settings.get("label_column"), settings.get("split_seed", 0))
    except (OSError, ModuleNotFoundError, ValueError) as error:
        return f"accuracy not checked: {error}"
    top1, images = measure(model, source.test, _SAMPLE)
    recorded = summary["test_top1"]
    tolerance = 0.5 / images
    if images < len(source.test):
        tolerance += 4 * math.sqrt(recorded * (1 - recorded) / images)
    found = f"accuracy on {images} of {len(source.test)} test images: {100 * top1:.2f}%, recorded {100 * recorded:.2f}%"
    if abs(top1 - recorded) > tolerance:
        raise ValueError(f"the weights are not those of the run: {found}")
    return found


def measure(model: nn.Module, images: Any, limit: int | None = None) -> tuple[float, int]:
    """Return top-1 accuracy on images, or on a stratified sample of `limit` of them, and the number of images."""
    if limit is not None and limit < len(images):
        images = images.subset(stratified_sample(images.labels, limit, 0))
    cfg: Any = model.pretrained_cfg
    pixels = decode(images, eval_transform(cfg))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return evaluate(model, pixels, torch.from_numpy(images.labels), cfg["mean"], cfg["std"]).top1, len(images)


def publish(
    files: dict[str, bytes | Path],
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
) -> Published:
    """Upload files in one commit, or none where the repository holds them already.

    Large files that an earlier attempt uploaded are not sent again.

    Args:
        files: See `files_of_run`.
        repo_id: ORG/NAME; created where it does not exist.
        private: Nobody else may see it.
        revision: Branch to commit to; created where it does not exist.
        create_pr: Open a pull request instead.

    Raises:
        PermissionError, FileNotFoundError, ValueError, ConnectionError: see `timm_sugar.hub.check_destination`.
        FileExistsError: somebody else committed meanwhile, or the repository is public and was to be private.
        ConnectionError: the upload broke off; another call goes on with it.
        OSError: the Hub refuses, or stored something else than what was sent.
    """
    api = HfApi()
    check_destination(repo_id, create_pr)
    if not create_pr:
        patiently(api.create_repo, repo_id, private=private or None, exist_ok=True)
        if private and not patiently(api.model_info, repo_id).private:
            raise FileExistsError(f"{repo_id} exists already, and is public")
        if revision:
            patiently(api.create_branch, repo_id, branch=revision, exist_ok=True)
    parent = head_of(repo_id, revision)

    def commit() -> CommitInfo:
        # Made anew for each attempt: what is in the repository by then is left out, so that none is made twice.
        operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        return api.create_commit(
            repo_id,
            operations,
            commit_message="Publish a run of timm-sugar",
            revision=revision,
            parent_commit=parent,
            create_pr=create_pr,
        )

    try:
        info = patiently(commit, unsafe=create_pr)
    except HfHubHTTPError as error:
        if error.response.status_code != 412:
            raise
        raise FileExistsError(
            f"somebody else committed to {repo_id} meanwhile; look at it and publish again"
        ) from error
    except (httpx.TransportError, RuntimeError) as error:
        reason = error.__cause__ or error
        raise ConnectionError(f"the upload to {repo_id} broke off ({reason}); publish again to go on") from error
    _check_stored(api, files, repo_id, info.oid)
    return Published(info.pr_url or f"{api.endpoint}/{repo_id}", info.oid, info.oid != parent)


def _check_stored(api: HfApi, files: dict[str, bytes | Path], repo_id: str, commit: str) -> None:
    stored = patiently(api.model_info, repo_id, revision=commit, files_metadata=True).siblings or []
    there = {file.rfilename: file for file in stored}
    for name, content in files.items():
        file = there.get(name)
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        if file is None or file.size != size:
            raise OSError(f"{repo_id} does not hold the {name} that was sent")
        if isinstance(content, Path) and file.lfs is not None and file.lfs.sha256 != file_hash(content):
            raise OSError(f"{repo_id} holds a {name} with another hash than that which was sent")
