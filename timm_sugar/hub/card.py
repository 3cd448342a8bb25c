"""Model cards: Hub metadata, and text with numbers from the files of a run."""

import json
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import timm
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import is_model

from ..data.sources import NAMES
from ..files import to_yaml
from ..metrics import METRICS
from ..settings import defaults, names_of
from ..surrogates import unknown_name
from .reload import loads_in

_TEMPLATE = Path(__file__).with_name("card.md")
_FACTS = ("license", "dataset", "dataset_note", "limits", "paper", "baseline")


def model_card(
    config: dict[str, Any],
    run: dict[str, Any],
    repo_id: str | None = None,
    facts: dict[str, Any] | None = None,
    curves: str | None = None,
) -> str:
    """Render the card of a packaged model.

    Args:
        config: The folder's config.json.
        run: The run's summary (see `timm_sugar.training`), with `settings`, its training settings.
        repo_id: ORG/NAME of the repository; None for a local folder.
        facts: Additional facts that are not in the run's files, from `read_facts`.
        curves: File with the training curves, next to the card.

    Returns:
        Markdown with Hub metadata, whose model-index holds the measured test accuracy. It contains no paths of the
        training machine, and text from the files is escaped.
    """
    facts = facts or {}
    settings = run["settings"]
    dataset_id, dataset_name = dataset_of(run["data"])
    dataset_id = facts.get("dataset", dataset_id)
    data = run["data"] if run["data"] in NAMES else dataset_id or "DATA"
    own = config["timm_sugar"]
    name = repo_id.partition("/")[2] if repo_id else f"{own['architecture']}.{dataset_name.replace('-', '_')}"
    origin, base = _origin(run.get("pretrained"))
    result = EvalResult(
        task_type="image-classification",
        dataset_type=dataset_id or dataset_name,
        dataset_name=dataset_name,
        dataset_split="test",
        dataset_args={key: settings.get(key) for key in ("label_column", "image_column", "split_seed")}
        | {key: settings[key] for key in ("skip_bad_images", "limit_test") if settings.get(key)},
        metric_type="accuracy",
        metric_name="top-1 accuracy",
        metric_value=round(run["test_top1"], 4),
    )
    metadata = ModelCardData(
        license=facts.get("license", "apache-2.0"),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["timm", "sugar", "relu", "surrogate-gradient", "arxiv:2505.22074"],
        datasets=[dataset_id] if dataset_id else None,
        base_model=base,
        model_name=name,
        eval_results=[result],
    )
    columns, rows = _results(run, facts)
    shown = to_yaml(told_settings(public_settings(settings, dataset_id)))
    card = ModelCard.from_template(
        metadata,
        template_path=str(_TEMPLATE),
        model_name=name,
        loads=loads_in(config),
        source=f"hf-hub:{repo_id}" if repo_id else "local-dir:FOLDER",
        location=repo_id or "FOLDER",
        own=own,
        origin=origin,
        base=base,
        run=run,
        facts=facts,
        columns=columns,
        rows=rows,
        dataset_name=dataset_name,
        data=data,
        curves=curves,
        classes=config["label_names"],
        settings=shown,
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0)),
        text=escape,
    )
    return str(card)


def _origin(source: str | None) -> tuple[str | None, str | None]:
    """Return the name of the initial weights of a run on the card, and their repository on the Hub."""
    if source is None:
        return None, None
    kind, _, place = source.rpartition(":")
    if kind == "local-dir":
        path = PurePosixPath(PureWindowsPath(place).as_posix())
        return path.parent.name if path.name == "model" else path.name, None
    if kind == "hf-hub":
        repo_id = place.partition("@")[0]
        return repo_id, repo_id
    cfg = timm.get_pretrained_cfg(source) if is_model(source.partition(".")[0]) else None
    return source, cfg.hf_hub_id if cfg else None


def _results(run: dict[str, Any], facts: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the results table: this run, the baseline and the paper."""
    baseline, paper = facts.get("baseline"), facts.get("paper")
    columns = ["", "this model"] + ["plain ReLU"] * bool(baseline) + ["the paper"] * bool(paper)
    rows = []
    for metric in METRICS:
        if not metric.card or run.get(metric.key) is None:
            continue
        row = [metric.label, metric.text(run[metric.key])]
        if baseline:
            row.append("" if baseline.get(metric.key) is None else metric.text(baseline[metric.key]))
        if paper:
            std = f" ± {metric.text(paper['std'])}" if paper.get("std") else ""
            row.append(metric.text(paper["top1"]) + std if metric.key == "test_top1" else "")
        rows.append(row)
    return columns, rows


def dataset_of(data: str) -> tuple[str | None, str]:
    """Return the Hub id of a data set, or None, and a name without local paths."""
    dataset = NAMES.get(data, data)
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", dataset) and not Path(data).exists()
    return dataset if is_hub_id else None, _file_name(data)


def public_settings(settings: dict[str, Any], dataset_id: str | None) -> dict[str, Any]:
    """Return training settings without those that describe the machine; paths become file names."""
    kept = {key: value for key, value in settings.items() if key not in names_of("start")}
    if "data" in kept:
        kept["data"] = public_data(kept["data"], dataset_id)
    public: dict[str, Any] = _without_paths(kept)
    return public


def told_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a card shows: those that differ from the defaults, and those of the data."""
    usual = defaults()
    kept = {name for name in names_of("data", "result") if settings.get(name) != usual[name]}
    kept |= {name for name in names_of("data") if settings.get(name) is not None}
    kept |= {"processes"} if settings.get("processes", 1) > 1 else set()
    return {name: value for name, value in settings.items() if name in kept}


def public_data(data: str, dataset_id: str | None) -> str:
    """Return --data for another machine: a name, the data set's Hub id, or the last part of a local folder."""
    return data if data in NAMES else dataset_id or _file_name(data)


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and value.startswith("local-dir:"):
        return f"local-dir:{_origin(value)[0]}"
    if isinstance(value, str) and (value.startswith(("/", "~", ".")) or PureWindowsPath(value).drive):
        return _file_name(value)
    return value


def _file_name(path: str) -> str:
    return PureWindowsPath(path).name if PureWindowsPath(path).drive else PurePosixPath(path).name


def escape(value: Any) -> str:
    """Escape text for Markdown and HTML, on one line."""
    line = " ".join(str(value).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~$-])", r"\\\1", line)


def read_facts(path: Path) -> dict[str, Any]:
    """Read additional facts for a card.

    Args:
        path: YAML with any of license; dataset, its Hub id; dataset_note and limits, text; paper, with top1 and std as
            fractions of 1 and where, the place in the paper; baseline, the path, relative to this file, of the
            summary.json of a run that differs only in having plain ReLU.

    Returns:
        The same, with the content of the baseline's file instead of its path.

    Raises:
        ValueError: an unknown name, or a value of the wrong kind.
        OSError: one of the files cannot be read.
    """
    facts = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(facts, dict):
        raise ValueError(f"{path} must hold names and values")
    for key, value in facts.items():
        if key not in _FACTS:
            raise ValueError(f"{path}: {unknown_name('fact', key, list(_FACTS))}")
        if key == "paper":
            if not isinstance(value, dict) or not {"top1", "where"} <= value.keys() or not 0 < value["top1"] <= 1:
                raise ValueError(f"{path}: paper must have top1, a fraction of 1, and where")
        elif not isinstance(value, str):
            raise ValueError(f"{path}: {key} must be text")
    if "baseline" in facts:
        facts["baseline"] = json.loads((path.parent / facts["baseline"]).read_text(encoding="utf-8"))
    return facts
