"""Pictures of runs and of what their networks do: curves over seeds, accuracies, activation profiles, dead units."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from .plots import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, Figure, new_figure, surrogate_style

# Beside colour, dashes, markers and hatches tell them apart, in grey print too.
STYLES = [
    (BLACK, "-", "o", ""),
    (BLUE, "--", "s", "////"),
    (ORANGE, "-.", "^", "...."),
    (GREEN, ":", "D", "xxxx"),
    (PURPLE, (0, (5, 1, 1, 1, 1, 1)), "v", "\\\\\\\\"),
    (SKY, (0, (1, 1)), "P", "++++"),
    (RED, (0, (8, 2)), "X", "oooo"),
    ("#8c6d00", (0, (3, 1, 1, 1)), "*", "****"),
]
LABELS = {
    "train_loss": "training loss",
    "val_loss": "validation loss",
    "val_top1": "validation accuracy (%)",
    "dead_units": "dead units (%)",
    "activation_sparsity": "activation sparsity (%)",
}


def seed_curves(
    runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    metrics: Sequence[str] = ("val_loss",),
    log_scale: bool = False,
) -> Figure:
    """Figures 2 and 9: metrics by epoch, the mean over the seeds with a band of one standard deviation.

    Args:
        runs: Label of each curve -> the runs of its seeds, each the lines of its metrics.jsonl. Epochs that not all of
            its runs have are left out.
        metrics: Fields of those lines, a panel each; fractions of 1 are drawn in percent.
        log_scale: Draw losses on a logarithmic axis, as the paper's figure 9.
    """
    figure, axes = new_figure(1, len(metrics), width=5.2 * len(metrics), height=3.8)
    for ax, metric in zip(axes[0], metrics, strict=True):
        label = LABELS.get(metric, metric)
        scale = 100 if label.endswith("(%)") else 1
        for place, (name, seeds) in enumerate(runs.items()):
            colour, dashes, marker, _ = STYLES[place % len(STYLES)]
            by_epoch = [
                {line["epoch"]: scale * line[metric] for line in lines if line.get(metric) is not None}
                for lines in seeds
            ]
            epochs = sorted(set.intersection(*(set(values) for values in by_epoch)))
            points = [[values[epoch] for values in by_epoch] for epoch in epochs]
            centre = [mean(values) for values in points]
            spread = [stdev(values) if len(values) > 1 else 0.0 for values in points]
            low, high = ([m + sign * s for m, s in zip(centre, spread, strict=True)] for sign in (-1, 1))
            ax.fill_between(epochs, low, high, color=colour, alpha=0.18, linewidth=0)
            style = {"color": colour, "linestyle": dashes, "marker": marker, "markevery": max(1, len(epochs) // 10)}
            ax.plot(epochs, centre, label=name, markersize=4, **style)
        ax.set(xlabel="epoch", ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
        if log_scale and "loss" in metric:
            ax.set_yscale("log")
    columns = min(len(runs), 2 * len(metrics))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=columns, frameon=False)
    return figure


def accuracy_bars(rows: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Figures 3 and 11 to 13: accuracy of each function, as it is and as SUGAR's surrogate, against the ReLU baseline.

    Args:
        rows: Of one network and data set: `activation` ("relu", "elu", "sugar_elu", "sugar_nelu_0.01", ...),
            `top1_percent`, and `std_percent`, its standard deviation over seeds, or None: no error bar then.
        title: Above the picture.

    Raises:
        ValueError: there is no row of "relu".
    """
    found = {row["activation"]: (float(row["top1_percent"]), float(row["std_percent"] or "nan")) for row in rows}
    if "relu" not in found:
        raise ValueError(f"no row has the activation relu, the baseline; there are {', '.join(found)}")
    functions = [n for n in dict.fromkeys(name.removeprefix("sugar_") for name in found) if n != "relu"]
    functions.sort(key=lambda name: found.get(f"sugar_{name}") or found[name])
    figure, axes = new_figure(1, 1, width=max(6.0, 1.2 + 0.85 * len(functions)), height=3.8)
    ax = axes[0, 0]
    baseline, spread = found["relu"]
    if not math.isnan(spread):
        ax.axhspan(baseline - spread, baseline + spread, color="0.8", linewidth=0)
    ax.axhline(baseline, color=BLACK, linewidth=1.4, label=f"ReLU, the baseline: {baseline:.1f}%")
    for prefix, shift, colour, hatch, label in (
        ("", -0.2, ORANGE, "", "the function itself"),
        ("sugar_", 0.2, BLUE, "////", "SUGAR: ReLU with its derivative"),
    ):
        drawn = [(place + shift, *found[prefix + n]) for place, n in enumerate(functions) if prefix + n in found]
        if drawn:
            x, tops, errors = zip(*drawn, strict=True)
            style = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": label, "capsize": 2.5}
            # From the baseline, so that lengths are differences and the axis need not begin at 0.
            ax.bar(x, [top - baseline for top in tops], 0.4, baseline, yerr=errors, error_kw={"linewidth": 1}, **style)
    ax.set_xticks(range(len(functions)), map(_function_label, functions))
    ax.set_ylabel("test accuracy (%)")
    figure.suptitle(title)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def activation_ridges(profiles: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Figures 4 and 10: for each layer, how many of its elements are active for which share of the images.

    All ridges have one scale: their height goes with the square root of the share of the elements, without which a
    bin that holds nearly all of them would hide the others. At the right stands the share of the units that are dead.

    Args:
        profiles: Label of each panel -> content of a profile.json, or `Profile.to_dict()`.
    """
    rows = max(len(found["layers"]) for found in profiles.values())
    figure, axes = new_figure(1, len(profiles), width=1 + 4.2 * len(profiles), height=max(2.6, 0.9 + 0.3 * rows))
    for place, (ax, (name, found)) in enumerate(zip(axes[0], profiles.items(), strict=True)):
        colour = STYLES[place % len(STYLES)][0]
        layers = found["layers"]
        ax.grid(False)
        for row, layer in enumerate(layers):
            counts, bins = layer["histogram"], len(layer["histogram"])
            edges = [100 * i / bins for i in range(bins + 1)]
            heights = [row - 2 * math.sqrt(count / sum(counts)) for count in counts]
            style = {"step": "post", "zorder": row}
            ax.fill_between(edges, row, [*heights, heights[-1]], facecolor="white", **style)
            ax.fill_between(edges, row, [*heights, heights[-1]], facecolor=colour, alpha=0.35, **style)
            ax.step(edges, [*heights, heights[-1]], where="post", color=colour, linewidth=0.9, zorder=row)
            ax.text(102, row, f"{100 * layer['dead'] / layer['units']:.0f}%", va="bottom", fontsize=7)
        ax.text(102, -1.9, "dead", fontsize=8, va="bottom")
        ax.set(title=name, xlim=(0, 100), ylim=(len(layers) - 0.9, -1.9))
        step = math.ceil(len(layers) / 20)
        ax.set_yticks(range(0, len(layers), step), [str(i + 1) for i in range(0, len(layers), step)])
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
    axes[0, 0].set_ylabel("layer, input at the top")
    figure.supxlabel("images for which an element is active (%)", fontsize=10)
    return figure


def dead_units_by_layer(profiles: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Share of dead units of each layer, a bar for each profile.

    Args:
        profiles: As for `activation_ridges`; layers are matched by their place in the forward pass.
    """
    rows = max(len(found["layers"]) for found in profiles.values())
    figure, axes = new_figure(1, 1, width=max(5.5, 1.5 + 0.16 * rows * (1 + len(profiles))), height=3.6)
    ax = axes[0, 0]
    width = 0.8 / len(profiles)
    for place, (name, found) in enumerate(profiles.items()):
        colour, _, _, hatch = STYLES[place % len(STYLES)]
        x = [row + 1 + (place - (len(profiles) - 1) / 2) * width for row in range(len(found["layers"]))]
        shares = [100 * layer["dead"] / layer["units"] for layer in found["layers"]]
        label = f"{name}: {100 * found['dead_units']:.1f}% of all"
        ax.bar(x, shares, width, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5, label=label)
    ax.set(xlabel="layer, in the order of the forward pass", ylabel="dead units (%)", xlim=(0.4, rows + 0.6))
    ax.set_ylim(0, max(1.0, ax.get_ylim()[1]))
    step = math.ceil(rows / 20)
    ax.set_xticks(range(1, rows + 1, step))
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=len(profiles), frameon=False)
    return figure


def gradient_norms_by_layer(norms: Sequence[Mapping[str, Any]]) -> Figure:
    """Gradient norm of each layer's weights with SUGAR and with ReLU, on a logarithmic axis.

    Args:
        norms: What `gradient_norms` returns.
    """
    figure, axes = new_figure(1, 1, width=max(5.5, 1.5 + 0.3 * len(norms)), height=3.4)
    ax = axes[0, 0]
    layers = range(1, len(norms) + 1)
    for place, (key, label) in enumerate((("relu", "ReLU"), ("sugar", "SUGAR"))):
        colour, dashes, marker, _ = STYLES[place]
        values = [row[key] or math.nan for row in norms]  # no logarithm where nothing arrives
        ax.plot(layers, values, color=colour, linestyle=dashes, marker=marker, markersize=4, label=label)
    ax.set(xlabel="convolution or linear layer, from the input", ylabel="norm of the gradient", yscale="log")
    ax.legend(frameon=False)
    return figure


def _function_label(name: str) -> str:
    function, _, alpha = name.rpartition("_")
    known = surrogate_style(name)[0]
    return known if known != name or not alpha[:1].isdigit() else f"{surrogate_style(function)[0]}\n{alpha}"
