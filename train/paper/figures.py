"""The paper's figures: appendix A, the surrogates, curves over seeds, and table 4 as bars."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.ticker import PercentFormatter

from timm_sugar.analysis.palette import PALETTE
from timm_sugar.analysis.plots import ON_DARK, Figure, new_figure, rc_context
from timm_sugar.surrogates import get_surrogate, list_surrogates

from .collapse import COLLAPSED, born_dead_bound, learned_below, relative_ranges
from .dying_relu import GRID, TARGETS

LABELS = {"bsilu": "B-SiLU", "nelu": "NeLU", "elu": "ELU", "selu": "SELU", "gelu": "GELU", "silu": "SiLU"}
LABELS |= {"mish": "Mish", "leaky_relu": "LeakyReLU", "relu": "ReLU"}
DRAWN_ALPHA = {"nelu": 0.1, "leaky_relu": 0.2}  # larger than the defaults, which would not be visible


def method_style(method: str) -> tuple[str, str, str, str]:
    """Label, colour, marker and dashes of a method of appendix A: the activation's colour, dashed for RAI."""
    _, found, surrogate = method.rpartition("sugar_")
    activation, colour, _ = surrogate_style(surrogate if found else "relu")
    start, marker, dashes = ("RAI", "s", "--") if method.startswith("rai") else ("He", "o", "-")
    return f"{'SUGAR ' if found else ''}{activation}, {start}", colour, marker, dashes


def surrogate_style(name: str) -> tuple[str, str, Any]:
    """Label, colour and dashes of a surrogate; user-registered ones are grey."""
    own = PALETTE.get(name)
    return LABELS.get(name, name), own.colour if own else "0.4", own.dashes if own else "--"


def sugar_gradients(dark: bool = False) -> Figure:
    """Figure 1: ReLU and its derivative, then ReLU with the derivatives of B-SiLU and of NeLU.

    Args:
        dark: Draw it for a dark page, with a transparent background.
    """
    with rc_context(ON_DARK if dark else {}):
        figure, axes = new_figure(1, 3, sharey=True)
    if dark:
        figure.patch.set_alpha(0)
    x = torch.linspace(-4, 4, 801)
    for ax, name in zip(axes[0], (None, "bsilu", "nelu"), strict=True):
        label, style, derivative = "ReLU", PALETTE[name or "relu"], (x > 0).float()
        colour = style.on_dark if dark else style.colour
        if name is not None:
            entry, alpha = get_surrogate(name), DRAWN_ALPHA.get(name)
            derivative = entry.derivative(x, entry.resolve_alpha(alpha))
            label = f"SUGAR with {_label_with_alpha(name)}"
        ax.plot(x, torch.relu(x), "--", color="0.65" if dark else "0.45")
        ax.plot(x, derivative, color=colour, linewidth=2)
        ax.text(2.3, 1.75, "forward", color="0.75" if dark else "0.35", ha="left")
        ax.text(3.9, 1.33 if name == "bsilu" else 1.06, "backward", color=colour, ha="right")
        ax.set(title=label, xlabel="pre-activation x", ylim=(-0.4, 2.2), xlim=(-4, 4))
        if dark:
            ax.patch.set_alpha(0)
            ax.grid(color="0.3")
    return figure


def surrogate_functions() -> Figure:
    """Figure 8: functions (if known) and derivatives of all surrogates, with those of ReLU in the background."""
    figure, axes = new_figure(1, 2, height=4.4)
    x = torch.linspace(-5, 3, 801)
    left, right = axes[0]
    left.set(title="function s(x)", xlabel="x", xlim=(-5, 3), ylim=(-2, 3.6))
    right.set(title="derivative s'(x)", xlabel="x", xlim=(-5, 3))
    left.plot(x, torch.relu(x), color="black", linewidth=2.4)
    right.plot(x, (x > 0).float(), color="black", linewidth=2.4, label="ReLU")
    for name in list_surrogates():
        entry = get_surrogate(name)
        alpha = entry.resolve_alpha(DRAWN_ALPHA.get(name))
        _, colour, dashes = surrogate_style(name)
        style = {"color": colour, "linestyle": dashes, "linewidth": 2.6 if name == "bsilu" else 1.6}
        if entry.function is not None:
            left.plot(x, entry.function(x, alpha), **style)
        right.plot(x, entry.derivative(x, alpha), label=_label_with_alpha(name), **style)
    right.legend(loc="upper left", frameon=False)
    return figure


def predictions(relu: dict[str, Any], sugar: dict[str, Any], run: int) -> Figure:
    """Figure 6: predictions of one run after training with ReLU (left) and with SUGAR (right), and the target.

    Args:
        relu: Result of `train` for a cell with scalar input, without a surrogate.
        sugar: Result of the same cell with a surrogate.
        run: Number of the run.
    """
    figure, axes = new_figure(1, 2, sharey=True)
    target = TARGETS[relu["function"]]
    for ax, result in zip(axes[0], (relu, sugar), strict=True):
        label, colour, _, _ = method_style(result["method"])
        ax.plot(GRID, target.function(GRID), color="0.6", linewidth=4, label=f"target {target.label}")
        ax.plot(GRID, result["prediction"][run], color=colour, linewidth=2, label="prediction")
        loss = result["loss"][run] / result["variance"][run]
        ax.set(title=f"{label}: loss {loss:.2g} of the variance", xlabel="x")
        ax.legend(frameon=False)
    return figure


def activation_probability(results: list[dict[str, Any]]) -> Figure:
    """Figure 7: fraction of positive pre-activations over the epochs, mean of the runs with their quartiles."""
    functions = _functions(results)
    figure, axes = new_figure(math.ceil(len(functions) / 2), 2, height=2.9, sharex=True, sharey=True)
    for ax, function in zip(axes.flat, functions, strict=False):
        ax.set_title(f"{function}: {TARGETS[function].label}")
        for result in _of(results, function):
            label, colour, _, dashes = method_style(result["method"])
            values = torch.tensor(result["activation"])
            low, high = values.quantile(torch.tensor([0.25, 0.75]), dim=1)
            epochs = range(len(values))
            ax.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
            ax.plot(epochs, values.mean(1), color=colour, linestyle=dashes, label=label)
        ax.yaxis.set_major_formatter(PercentFormatter(1))
        ax.set_ylim(0, 1)
    if len(functions) % 2:
        axes[-1, 1].set_visible(False)
        if len(functions) > 1:
            axes[-2, 1].tick_params(labelbottom=True)
    figure.supxlabel("epoch")
    figure.supylabel("active units")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def loss_histograms(results: list[dict[str, Any]]) -> Figure:
    """Final losses relative to the target's variance, one row per function and one column per method.

    The axis is logarithmic, losses below its range are clipped; table 3's ranges are grey, our thresholds dotted.
    """
    functions = _functions(results)
    methods = list(dict.fromkeys(result["method"] for result in results))
    figure, axes = new_figure(len(functions), len(methods), height=1.45, sharex=True, sharey=True)
    bins = torch.logspace(-5, math.log10(2), 54).tolist()
    for row, function in zip(axes, functions, strict=True):
        row[0].set_ylabel(f"{function}\nruns")
        for ax, result in zip(row, _of(results, function), strict=True):
            for category, (low, high) in relative_ranges(function).items():
                ax.axvspan(low, high, color="0.85", linewidth=0, zorder=0)
                place = {"A": 1.35, "B": 0.62}.get(category, math.sqrt(low * high))
                style = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "top", "fontsize": 8}
                height = 0.98 if category == "A" else 0.86  # lower, since B and D are close to A
                ax.text(place, height, category, color="0.3", **style)
            for border in (COLLAPSED, learned_below(function)):
                if border is not None:
                    ax.axvline(border, color="0.4", linestyle=":", linewidth=1)
            losses = [a / b for a, b in zip(result["loss"], result["variance"], strict=True)]
            clipped = [min(max(loss, bins[0]), bins[-1]) for loss in losses]
            ax.hist(clipped, bins, color=method_style(result["method"])[1])
            ax.set_xscale("log")
            ax.set_ylim(0, 1.25 * len(losses))  # space for the letters above the bars
    for ax, method in zip(axes[0], methods, strict=True):
        ax.set_title(method_style(method)[0])
    figure.supxlabel("final loss / variance of the target")
    return figure


def collapse_by_depth(rows: list[dict[str, Any]]) -> Figure:
    """Percent of collapsed runs against depth with Wilson 95% intervals, and the theoretical lower bound for He.

    Args:
        rows: Rows from `table_row` for one function and width.
    """
    figure, axes = new_figure(1, 1, width=7, height=4.2)
    ax = axes[0, 0]
    width = rows[0]["width"]
    depths = range(1, max(row["depth"] for row in rows) + 1)
    bound = [100 * born_dead_bound(depth, width) for depth in depths]
    ax.plot(depths, bound, color="0.45", linestyle=":", linewidth=2, label="He, born dead: lower bound (theory)")
    for method in dict.fromkeys(row["method"] for row in rows):
        label, colour, marker, dashes = method_style(method)
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["depth"])
        shares = [row["A"] for row in own]
        ends = [row["interval"]["A"] for row in own]
        errors = [[share - low for share, (low, _) in zip(shares, ends, strict=True)]]
        errors.append([high - share for share, (_, high) in zip(shares, ends, strict=True)])
        style = {"color": colour, "marker": marker, "linestyle": dashes, "capsize": 3, "label": label}
        ax.errorbar([row["depth"] for row in own], shares, errors, **style)
    ax.set(xlabel=f"hidden layers of width {width}", ylabel="collapsed runs", ylim=(-2, 102))
    ax.yaxis.set_major_formatter(PercentFormatter(100))
    ax.legend(frameon=False, loc="lower right")
    return figure


def _label_with_alpha(name: str) -> str:
    alpha = DRAWN_ALPHA.get(name)
    return surrogate_style(name)[0] + ("" if alpha is None else f" ({alpha:g})")


def _functions(results: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(result["function"] for result in results))


def _of(results: list[dict[str, Any]], function: str) -> list[dict[str, Any]]:
    return [result for result in results if result["function"] == function]


def accuracy_bars(rows: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Figures 3 and 11 to 13: accuracy of each function, itself and as SUGAR's surrogate, against the ReLU baseline.

    Args:
        rows: For one network and data set: `activation` ("relu", "elu", "sugar_elu", "sugar_nelu_0.01", ...),
            `top1_percent`, and `interval_percent`, half the width of its interval, or None for no error bar.
        title: Title above the picture.

    Raises:
        ValueError: there is no row of "relu".
    """
    found = {row["activation"]: (float(row["top1_percent"]), float(row["interval_percent"] or "nan")) for row in rows}
    if "relu" not in found:
        raise ValueError(f"no row has the activation relu, the baseline; there are {', '.join(found)}")
    functions = [n for n in dict.fromkeys(name.removeprefix("sugar_") for name in found) if n != "relu"]
    functions.sort(key=lambda name: found.get(f"sugar_{name}") or found[name])
    figure, axes = new_figure(1, 1, width=max(8.5, 1.2 + 0.85 * len(functions)), height=3.8)
    ax = axes[0, 0]
    baseline, spread = found["relu"]
    if not math.isnan(spread):
        ax.axhspan(baseline - spread, baseline + spread, color="0.8", linewidth=0)
    ax.axhline(baseline, color="black", linewidth=1.4, label=f"ReLU, the baseline: {baseline:.1f}%")
    for place, name in enumerate(functions):
        colour = surrogate_style(name if name in PALETTE else name.rpartition("_")[0])[1]
        for shift, key, face in ((-0.2, name, "white"), (0.2, f"sugar_{name}", colour)):
            if key not in found:
                ax.text(place + shift, baseline, " no run", ha="center", va="bottom", rotation=90, fontsize=7)
                continue
            top, error = found[key]
            style = {"facecolor": face, "edgecolor": colour, "capsize": 2.5, "error_kw": {"linewidth": 1}}
            # Bars start at the baseline, so that lengths are differences and the axis need not start at 0.
            bars = ax.bar(place + shift, top - baseline, 0.4, baseline, yerr=error, **style)
            ax.bar_label(bars, [f"{top - baseline:+.1f}"], padding=2, fontsize=7)
    ax.margins(y=0.08)
    for face, label in (("white", "the function itself"), ("0.3", "SUGAR: ReLU with its derivative")):
        ax.bar(0, 0, 0, baseline, facecolor=face, edgecolor="0.3", label=label)
    ax.set_xticks(range(len(functions)), map(_function_label, functions))
    ax.set_ylabel("test accuracy (%)")
    figure.suptitle(title)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _function_label(name: str) -> str:
    function, _, alpha = name.rpartition("_")
    known = surrogate_style(name)[0]
    return known if known != name or not alpha[:1].isdigit() else f"{surrogate_style(function)[0]}\n{alpha}"
