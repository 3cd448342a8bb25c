"""Metrics of a run: a table of their keys in metrics.jsonl and summary.json, labels, units and directions."""

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """A measured number, a number per class, or a count per pair of class and prediction."""

    key: str  # in metrics.jsonl and summary.json
    label: str
    unit: Literal["%", "nats", "images/s", "s", ""]  # "%" is a fraction of 1 in the files
    better: Literal["higher", "lower"] | None  # None if neither direction is better
    split: Literal["train", "val", "test"]  # summary.json contains those of val and test, of the best epoch
    chart: str | None = None  # title of the chart over epochs that shows it; several metrics may share a chart
    column: bool = False  # whether it is shown in the report's summary and in the line printed after each epoch
    card: bool = False  # whether it is shown in the model card
    shape: Literal["number", "class", "pair"] = "number"

    @property
    def scale(self) -> int:
        """Factor from a value in the files to `unit`."""
        return 100 if self.unit == "%" else 1

    @property
    def limits(self) -> tuple[float, float]:
        """The lowest and highest possible value, in `unit`, at which intervals are clipped."""
        return {"%": (0.0, 100.0), "nats": (0.0, math.inf)}.get(self.unit, (-math.inf, math.inf))

    @property
    def axis(self) -> str:
        """Label of an axis: "dead units (%)"."""
        return with_unit(self.label, self.unit)

    def text(self, value: float) -> str:
        """Format a value for display: 0.98765 as "98.77%", 64.2 s as "64 s"."""
        if self.unit == "s" and value >= 100:
            minutes = round(value / 60)
            return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
        form = {"%": "{:.2f}%", "nats": "{:.4f}", "images/s": "{:,.0f}", "s": "{:.0f} s", "": "{:.4g}"}[self.unit]
        return form.format(self.scale * value)


METRICS = [
    Metric("test_top1", "test top-1 accuracy", "%", "higher", "test", column=True, card=True),
    Metric("test_top5", "test top-5 accuracy", "%", "higher", "test", card=True),
    Metric("test_class_top1", "test top-1 accuracy by class", "%", "higher", "test", shape="class"),
    Metric("test_confusion", "confusion matrix", "", None, "test", shape="pair"),
    Metric("val_top1", "validation top-1 accuracy", "%", "higher", "val", chart="Accuracy", column=True, card=True),
    Metric("val_top5", "validation top-5 accuracy", "%", "higher", "val"),
    Metric("test_loss", "test loss", "nats", "lower", "test", column=True),
    Metric("train_loss", "training loss", "nats", "lower", "train", chart="Loss", column=True),
    Metric("val_loss", "validation loss", "nats", "lower", "val", chart="Loss", column=True),
    Metric("lr", "learning rate", "", None, "train", chart="Learning rate"),
    Metric("dead_units", "dead units", "%", "lower", "val", chart="Dead units", column=True, card=True),
    Metric("train_dead_units", "dead units in training", "%", "lower", "train", chart="Dead units"),
    Metric("dead_elements", "dead elements", "%", "lower", "val"),
    Metric("activation_sparsity", "activation sparsity", "%", None, "val", "Activation sparsity", True, True),
    Metric("images_per_second", "images/s", "images/s", "higher", "train", column=True),
    Metric("seconds", "time", "s", "lower", "train", column=True),
    Metric("alpha", "alpha", "", None, "train"),
]


def find_metric(key: str) -> Metric:
    """Return the metric of a key."""
    return next(metric for metric in METRICS if metric.key == key)


def numbers(measured: dict[str, Any]) -> dict[str, float]:
    """Return the metrics that have a value, by key."""
    return {m.key: measured[m.key] for m in METRICS if isinstance(measured.get(m.key), (int, float))}


def with_unit(label: str, unit: str) -> str:
    """Return a label with its unit, if any, in parentheses."""
    return f"{label} ({unit})" if unit else label
