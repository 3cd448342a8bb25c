"""The image of a run's training curves that its card shows."""

import importlib.util
import io
from typing import Any


def training_curves(metrics: list[dict[str, Any]]) -> bytes | None:
    """Draw loss and validation accuracy by epoch.

    Args:
        metrics: The lines of metrics.jsonl.

    Returns:
        PNG, the same bytes for the same numbers; None without matplotlib, which comes with the extra "report".
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = [line["epoch"] for line in metrics]
    validated = metrics[0].get("val_top1") is not None
    figure = Figure(figsize=(9 if validated else 4.5, 3.2), layout="constrained")
    axes = figure.subplots(1, 1 + validated, squeeze=False)[0]
    axes[0].plot(epochs, [line["train_loss"] for line in metrics], label="training")
    axes[0].set(xlabel="epoch", ylabel="cross-entropy (nats)")
    if validated:
        axes[0].plot(epochs, [line["val_loss"] for line in metrics], label="validation")
        axes[1].plot(epochs, [100 * line["val_top1"] for line in metrics], label="validation")
        axes[1].set(xlabel="epoch", ylabel="top-1 accuracy (%)")
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
        axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
