"""Metrics: how values are written, and that a new one is a row and where it is computed."""

import json
import sys

import pytest

from timm_sugar.analysis import report_charts
from timm_sugar.analysis.report import epoch_table, summary_table
from timm_sugar.analysis.run import read_run
from timm_sugar.metrics import METRICS, Metric, find_metric
from timm_sugar.settings import TrainConfig
from timm_sugar.training import train

LOOP = sys.modules["timm_sugar.training.train"]  # the function has the same name


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("val_top1", 0.98765, "98.77%"),
        ("train_loss", 0.123456, "0.1235"),
        ("lr", 0.00012345, "0.0001234"),
        ("images_per_second", 12345.6, "12,346"),
        ("seconds", 64.2, "64 s"),
        ("seconds", 1200.0, "20 min"),
        ("seconds", 9000.0, "2 h 30 min"),
    ],
)
def test_values_as_text(key, value, text):
    assert find_metric(key).text(value) == text


def test_keys_and_labels_are_unique():
    assert len({metric.key for metric in METRICS}) == len({metric.label for metric in METRICS}) == len(METRICS)
    assert find_metric("dead_units").axis == "dead units (%)"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_a_new_metric_is_a_row_and_where_it_is_computed(tmp_path, monkeypatch):
    """Loop, summary, trackers, report and card show it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    row = Metric("weight_norm", "weight norm", "", "lower", "val", chart="Weight norm", column=True, card=True)
    METRICS.append(row)
    try:
        measure, values = LOOP.evaluate_split, iter((3.5, 2.5, 1.5))

        def with_norm(*arguments):
            return measure(*arguments) | {"weight_norm": next(values)}

        monkeypatch.setattr(LOOP, "evaluate_split", with_norm)
        small = dict(limit_train=64, limit_val=20, img_size=16, batch_size=16, model_args={"channels": [8, 8, 8, 8]})
        train(TrainConfig(**small, data="digits", epochs=2, output=str(tmp_path), tracker="tensorboard"))

        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["weight_norm"] for line in lines] == [3.5, 2.5]
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["weight_norm"] == lines[summary["best_epoch"] - 1]["weight_norm"]
        (folder,) = {p.parent for p in tmp_path.rglob("events.out.tfevents*") if p.parent.name == "timm-sugar"}
        events = EventAccumulator(str(folder))
        events.Reload()
        assert [event.value for event in events.Scalars("weight_norm")] == [3.5, 2.5]
        shown = row.text(summary["weight_norm"])
        assert f"| weight norm | {shown} |" in (tmp_path / "model/README.md").read_text()
        record = read_run(tmp_path, "run")
        heads, cells = summary_table({"run": [record]})
        assert cells["run"][heads.index("weight norm")] == (shown, False)
        heads, rows = epoch_table(record.metrics)
        assert [row[heads.index("weight norm")] for row in rows] == ["3.5", "2.5"]
        charts = {chart["id"]: chart for chart in report_charts.curve_charts({"run": [record.metrics]})}
        assert charts["weight-norm"]["data"][0]["y"] == [3.5, 2.5]
    finally:
        METRICS.remove(row)
