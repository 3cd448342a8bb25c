"""Test which networks accept SUGAR, and how; write docs/convert.md. Run ``python benchmarks/convert_reach.py``.

Builds one small model of each timm module, torchvision's classifiers and transformers configurations on the meta
device: with an activation name, with an activation class, and unchanged, for `convert`. No forward pass is run.
"""

import argparse
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torchvision
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

from timm_sugar import Sugar, convert
from timm_sugar.convert import NOT_RECORDED, read_note
from timm_sugar.files import write_file

ACT_CLASS = timm.layers.get_act_layer("sugar_bsilu")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "convert.md"

# Parts of names, from small to large.
_SIZES = ("test_", "zepto", "atto", "femto", "pico", "nano", "xxs", "xs", "tiny", "_t", "small", "_s", "0", "18", "26")

TORCHVISION = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18"),
    *("resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vit_b_16"),
)
TRANSFORMERS = {
    "ViT": ("ViTForImageClassification", "ViTConfig", {"num_hidden_layers": 2}),
    "ConvNext": ("ConvNextForImageClassification", "ConvNextConfig", {}),
    "BERT": ("BertForMaskedLM", "BertConfig", {"num_hidden_layers": 2}),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {"num_hidden_layers": 2, "vocab_size": 128}),
}


class WithoutInitialisation(TorchFunctionMode):
    """Skips weight initialisation, which takes half the time and has no effect on the meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class Row(NamedTuple):
    """How one network accepts SUGAR.

    Attributes:
        family, model: Where it comes from.
        by_name, by_class: Whether the constructor takes ``"sugar_bsilu"``, or the class, for its activation.
        converted: Activations that `convert` replaces, such as "12 GELU"; empty if there are none.
        left: Activations that it does not replace: gates, opt-in activations, and functional calls in a forward.
        recorded: Whether a saved model loads with SUGAR; None if the library saves no configuration.
        stock: Whether timm alone loads the saved converted network, as a ReLU network.
    """

    family: str
    model: str
    by_name: bool
    by_class: bool
    converted: str
    left: str
    recorded: bool | None
    stock: bool


def smallest() -> dict[str, str]:
    """Return a model of each timm module whose name suggests that it is small."""
    modules = {m: [n for n in timm.list_models(module=m) if _is_stock(n)] for m in timm.list_modules()}
    return {module: min(names, key=_size) for module, names in modules.items() if names}


def _is_stock(name: str) -> bool:
    return timm.models.model_entrypoint(name).__module__.startswith("timm.")


def _size(name: str) -> tuple[int, str]:
    return next((i for i, part in enumerate(_SIZES) if part in name), len(_SIZES)), name


def reach(family: str, model: str, build: Callable[..., nn.Module], argument: str = "act_layer") -> Row:
    """Try all three ways for one network; `build` takes keyword arguments of its constructor."""

    def takes(value: object) -> bool:
        try:
            return any(isinstance(m, Sugar) for m in build(**{argument: value}).modules())
        except Exception:  # constructors raise different errors for unsupported arguments
            return False

    with torch.device("meta"), WithoutInitialisation(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f"convert does not reach|{NOT_RECORDED}")
        network = build()
        try:
            report = convert(network).sugar_report
        except ValueError as e:
            left = str(e).partition(": ")[2]
            return Row(family, model, takes("sugar_bsilu"), takes(ACT_CLASS), "", left, None, False)
        left = [f"{_count(report.gates.values())} in gates"] if report.gates else []
        for name, calls in report.unreached.items():
            left += [f"{call} in `{type(network.get_submodule(name)).__name__}.forward`" for call in calls]
        return Row(
            family,
            model,
            by_name=takes("sugar_bsilu"),
            by_class=takes(ACT_CLASS),
            converted=_count(report.converted.values()),
            left=", ".join(dict.fromkeys(left)),
            recorded=report.recorded,
            stock=read_note(getattr(network, "pretrained_cfg", {})) is not None,
        )


def _count(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(f"{names.count(n)} {n}" for n in sorted(set(names)))


def rows() -> Iterator[Row]:
    """Yield a row for each network."""
    for module, name in smallest().items():
        yield reach(module, name, lambda name=name, **kwargs: timm.create_model(name, **kwargs))
    for name in TORCHVISION:

        def build(name: str = name, **kwargs: object) -> nn.Module:
            if name in ("googlenet", "inception_v3"):
                kwargs["init_weights"] = False
            with torch.device("cpu" if name.startswith("regnet") else "meta"):  # RegNet computes its widths
                return torchvision.models.get_model(name, **kwargs)

        yield reach("torchvision", name, build)
    import timm_sugar.transformers  # noqa: F401

    for name, (model, config, small) in TRANSFORMERS.items():

        def build(model: str = model, config: str = config, small: dict = small, **kwargs: object) -> nn.Module:
            return getattr(transformers, model)(getattr(transformers, config)(**small, **kwargs))

        yield reach("transformers", name, build, argument="hidden_act")


def render(rows: list[Row]) -> str:
    """Return the page as Markdown."""
    timm_rows = [row for row in rows if row.family not in ("torchvision", "transformers")]
    name, class_only = (sum(r.by_name for r in timm_rows), sum(r.by_class and not r.by_name for r in timm_rows))
    lines = [
        "# What SUGAR reaches",
        "",
        "There are three ways to use SUGAR in a network that is not one of ours:",
        "",
        '- **by name**: `timm.create_model(name, act_layer="sugar_bsilu")`; in transformers, after',
        '  `import timm_sugar.transformers`, `hidden_act="sugar_bsilu"`;',
        '- **by class**: `timm.create_model(name, act_layer=timm.layers.get_act_layer("sugar_bsilu"))`;',
        "- **by convert**: `timm_sugar.convert(model)`, on any network, with or without weights.",
        "",
        "`convert` replaces activation modules and function-valued attributes. It does not change gates:",
        "squeeze-excite, coordinate attention, sigmoid, hard-sigmoid, hard-swish. ReLU6 and hard-swish are replaced",
        'on request: `convert(model, replace=["relu", "relu6"])`. `convert` cannot replace functional calls in a',
        "forward (`F.relu(x)`); a warning names them.",
        "",
        "*Comes back* says whether a saved model loads with SUGAR. timm's `save_for_hf` and `push_to_hf_hub` record",
        "the current surrogate and alpha, and `timm_sugar.create_model` restores them. With *yes*, stock timm loads",
        "the model as the ReLU network that it is at inference; with *here alone*, stock timm has no such network and",
        "raises an error. transformers records it in `config.hidden_act`, with `import timm_sugar.transformers`. If",
        "neither can record the conversion, `convert` warns. torchvision saves no configuration. Apply",
        "`timm_sugar.to_relu` before you share a network of transformers, or one that you save in another way.",
        "",
        f"Of timm's {len(timm_rows)} model modules {name} take a name, {class_only} only a class, and "
        f"{len(timm_rows) - name - class_only} neither. `convert` reaches {sum(bool(r.converted) for r in timm_rows)}",
        "of them (tested with the network below), and on request those that only have ReLU6.",
        "",
        f"Written by `python benchmarks/convert_reach.py` with timm {timm.__version__}, torchvision "
        f"{torchvision.__version__.partition('+')[0]} and transformers {transformers.__version__}.",
        "",
        "| family | network | by name | by class | by convert | left alone, or out of reach | comes back |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    mark = {True: "yes", False: "no", None: "", "alone": "here alone"}
    for r in rows:
        converted = r.converted or ("on request" if "left" in r.left else "no")
        back = "alone" if r.recorded and not r.stock and r.family != "transformers" else r.recorded
        cells = (r.family, r.model, mark[r.by_name], mark[r.by_class], converted, r.left, mark[back])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PAGE, help="Markdown file (default docs/convert.md)")
    write_file(parser.parse_args().output, render(list(rows())))


if __name__ == "__main__":
    main()
