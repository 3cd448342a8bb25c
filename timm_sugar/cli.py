"""The command line: ``timm-sugar COMMAND``. A command is a function decorated by ``@_command``, with its arguments."""

import argparse
import json
import math
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import timm
import torch
from huggingface_hub import get_token
from huggingface_hub.utils import disable_progress_bars
from timm.models import model_entrypoint

from . import __version__, hub
from ._program import output_error
from .activations import calls_summary
from .analysis import gradient_norms, loss_landscape, profile, summarise_landscape
from .analysis.palette import assign_styles
from .analysis.speed import activations, bench
from .files import write_file
from .layers import Activation
from .models import is_own
from .models._weights import list_weights
from .terminal import Parser, print_table, progress_bars

Argument: TypeAlias = tuple[str, dict[str, Any]]  # arguments of `argparse.ArgumentParser.add_argument`
Run: TypeAlias = Callable[[argparse.Namespace], int | None]  # prints its result and returns the exit status, 0 for None

COMMANDS: dict[str, Run] = {}
_PARSER = Parser(prog="timm-sugar", description="Inspect, publish and verify networks with SUGAR.")
_PARSER.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
_SUBPARSERS = _PARSER.add_subparsers(dest="command", metavar="COMMAND", required=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: Arguments without the program's name; None takes sys.argv.

    Returns:
        Exit status: 0 on success, 1 after a failure, reported as one line on stderr. A usage error exits with 2.
    """
    args = _parse(argv)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        status = COMMANDS[args.command](args) or 0
        if problem := output_error():
            raise OSError(f"the output cannot be written: {problem}")
        return status
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        lines = traceback.format_exc() if args.debug else ""
        message = " ".join(str(error).split()) or type(error).__name__
        print(_without_token(f"{lines}timm-sugar {args.command}: error: {message}"), file=sys.stderr)
        return 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args, others = _PARSER.parse_known_args(argv)
    if others and not args.passes:
        _PARSER.error(f"unrecognized arguments: {' '.join(others)}")
    args.others = others
    return args


def _without_token(text: str) -> str:
    """Return text without the Hub's token, which an error message of a library may contain."""
    token = get_token()
    return text.replace(token, "***") if token else text


def _command(help: str, example: str, *arguments: Argument, passes: bool = False) -> Callable[[Run], Run]:
    """Register a function ``_NAME`` as the subcommand NAME.

    Args:
        help: Description; its first sentence appears in the list of commands.
        example: An example command line.
        arguments: The arguments of the command.
        passes: Accept any other flag too, as `args.others`.
    """

    def register(run: Run) -> Run:
        name = run.__name__.removeprefix("_")
        parser = _SUBPARSERS.add_parser(
            name,
            help=help.partition(". ")[0],
            description=help,
            epilog=f"example: {example}",
            allow_abbrev=not passes,  # else a trainer's flag could match an abbreviated flag of the command
        )
        for flag, options in (*arguments, _switch("--debug", "show the traceback of an error")):
            parser.add_argument(flag, **options)
        parser.set_defaults(passes=passes)
        COMMANDS[name] = run
        return run

    return register


def _argument(name: str, help: str, **options: Any) -> Argument:
    return name, {"help": help, **options}


def _switch(name: str, help: str) -> Argument:
    return _argument(name, help, action="store_true")


_MODEL = "folder of a run or of a published model, ORG/NAME, or a model's name"
_DATA = (
    _argument("--data", "digits, cifar10, cifar100, tiny-imagenet, a Hub id or a folder", required=True),
    _argument("--label-column", "column of the class labels (default: as in the model card)"),
    _argument("--image-column", "column of the images (default: as in the model card)"),
)
_JSON = _switch("--json", "print the result as JSON")


@_command(
    "list the models of this package: parameters, activation, and the tags and sources of their weights",
    "timm-sugar models --json",
    _JSON,
)
def _models(args: argparse.Namespace) -> None:
    rows = []
    for name in filter(is_own, timm.list_models()):
        model = model_entrypoint(name)(device="meta")
        own = Activation.of(model)
        alpha = "" if own.alpha is None else f" {own.alpha:g}"
        activation = f"SUGAR {own.surrogate}{alpha}" if own.surrogate else "GELU"
        parameters = sum(p.numel() for p in model.parameters())
        rows.append(dict(name=name, parameters=parameters, activation=activation, weights=list_weights(name)))
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    table = []
    for row in rows:
        weights = [f"{tag} ({source.removeprefix('local-dir:')})" for tag, source in row["weights"].items()]
        table.append((row["name"], f"{row['parameters']:,}", row["activation"], ", ".join(weights) or "-"))
    print_table(("model", "parameters", "activation", "weights"), table, left=(0, 2, 3))


@_command(
    "predict the classes of images. A file that cannot be read is skipped; the exit status is then 1",
    "timm-sugar predict photo.jpg path/to/folder --model output/digits --top 3",
    _argument("images", "image files, and folders, searched recursively", metavar="IMAGE_OR_FOLDER", nargs="+"),
    _argument("--model", f"{_MODEL}; also local-dir:FOLDER and hf-hub:ORG/NAME", required=True),
    _argument("--top", "classes per image (default: 5)", type=int, default=5, metavar="N"),
    _switch("--json", "print one JSON object per line: file, and classes (number, name, probability) or error"),
)
def _predict(args: argparse.Namespace) -> int:
    if args.top < 1:
        raise ValueError(f"top must be at least 1, got {args.top}")
    files = hub.image_files(args.images)
    network = hub.find_model(args.model).load().to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{args.model}: {hub.summary_line(network)}", file=sys.stderr)
    failed = []
    with progress_bars("images") as (on_image,):
        for done, found in enumerate(hub.predict(network, files, args.top), 1):
            if found.error:
                failed.append(found)
            if args.json:
                classes = [dict(number=k, name=name, probability=value) for k, name, value in found.classes]
                answer = dict(error=found.error) if found.error else dict(classes=classes)
                print(json.dumps(dict(file=found.file) | answer))
            elif not found.error:
                print(f"{found.file}: {', '.join(f'{name} {100 * value:.1f}%' for _, name, value in found.classes)}")
            on_image(done, len(files))
    for found in failed:
        print(f"timm-sugar predict: {found.file} {found.error}", file=sys.stderr)
    if failed:
        print(f"timm-sugar predict: error: {len(failed)} of {len(files)} files gave no class", file=sys.stderr)
    return 1 if failed else 0


@_command(
    "train a network with its own activation, or ReLU, and with SUGAR, over learning rates and seeds, and test whether "
    "they differ. It can be stopped at any time: the same command resumes it. Rates, surrogates and seeds can be added "
    "later. All other flags, such as --epochs, are passed to the trainer for every run",
    "timm-sugar compare --data path/to/folder --model resnet18 --lrs 0.001 0.003 --seeds 3 --minutes 60",
    _argument("--data", "digits, cifar10, cifar100, tiny-imagenet, a Hub id or a folder", required=True),
    _argument("--output", "default: output/compare", type=Path, default=Path("output/compare"), metavar="DIR"),
    _argument("--surrogates", "default: bsilu nelu", nargs="+", metavar="NAME"),
    _argument("--lrs", "learning rates (default: 0.0003 0.001 0.003)", nargs="+", type=float, metavar="RATE"),
    _argument("--seeds", "number of seeds, starting at 0 (default: 3)", type=int, metavar="N"),
    _argument("--minutes", "stop after M minutes; the same command resumes", type=float, default=math.inf, metavar="M"),
    _argument("--jobs", "parallel runs (default: one per CPU core, or one on a GPU)", type=int, metavar="N"),
    _JSON,
    passes=True,
)
def _compare(args: argparse.Namespace) -> int:
    from .analysis.comparison import remarks, result_tables

    try:
        from .training.compare import plan, table
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"compare needs {error.name}: pip install 'timm-sugar[train]'") from error

    for name in ("minutes", "jobs"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(args, name):g}")
    began = time.monotonic()
    comparison = plan(args.output, ["--data", args.data, *args.others], args.surrogates, args.lrs, args.seeds)
    failures = comparison.train(args.jobs, max(0.0, args.minutes - (time.monotonic() - began) / 60))
    found = table(comparison)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        for title, head, rows in result_tables(found):
            print(f"{title}:")
            print_table(head, rows)
            print()
        print("\n".join(remarks(found)))
    for cell, reason in failures.items():
        print(f"timm-sugar compare: error: {cell} failed: {reason}", file=sys.stderr)
    if failures:
        return 1
    if found["done"] < found["runs"]:
        print("timm-sugar compare: time is up; the same command goes on", file=sys.stderr)
        return os.EX_TEMPFAIL  # same status as a sweep that --minutes stops
    return 0


@_command(
    "publish a finished run on the Hub, in one commit",
    "timm-sugar publish output/digits --repo-id me/resnet18_sugar_bsilu.digits --dry-run",
    _argument("output", "folder of a finished run, or one written by --to-folder", metavar="OUTPUT", type=Path),
    _argument("--repo-id", "repository; created if it does not exist", required=True, metavar="ORG/NAME"),
    _argument(
        "--facts",
        "additional facts for the model card (default: facts.yaml in OUTPUT or DIR, if it exists)",
        type=Path,
        metavar="YAML",
    ),
    _switch(
        "--half",
        "store weights in float16, except 1-D tensors, and report the accuracy of that file, measured in timm and "
        "in transformers",
    ),
    _argument("--data", "current location of the test images (default: as in training)"),
    _argument("--to-folder", "write the files into DIR, without an upload", type=Path, metavar="DIR"),
    _switch("--private", "create a private repository"),
    _argument("--revision", "branch to commit to; created if it does not exist", metavar="BRANCH"),
    _switch("--create-pr", "open a pull request instead of committing"),
    _switch("--dry-run", "check the run and list the files, without an upload"),
)
def _publish(args: argparse.Namespace) -> None:
    if args.to_folder and (args.private or args.revision or args.create_pr):
        raise ValueError("--to-folder sends nothing, so --private, --revision and --create-pr are not for it")
    beside = (folder / "facts.yaml" for folder in (args.output, args.to_folder) if folder)
    path = args.facts or next((path for path in beside if path.is_file()), None)
    facts = hub.read_facts(path) if path else None
    with tempfile.TemporaryDirectory() as place:
        output = hub.to_float16(args.output, Path(place, "run"), args.data) if args.half else args.output
        files = hub.published_files(output, args.repo_id, facts)
        print(hub.check_weights(output, args.data))
        if args.to_folder and not args.dry_run:
            files = hub.write_folder(output, args.repo_id, args.to_folder, facts)
        if args.dry_run or args.to_folder:
            sizes = {n: c.stat().st_size if isinstance(c, Path) else len(c) for n, c in sorted(files.items())}
            print_table(("file", "bytes"), [(name, f"{size:,}") for name, size in sizes.items()])
            where = args.to_folder or args.repo_id
            print(f"nothing was sent; without --dry-run these go to {where}" if args.dry_run else f"written to {where}")
            return
        done = hub.publish(files, args.repo_id, args.private, args.revision, args.create_pr, print)
    print(f"{'published' if done.changed else 'nothing has changed since it was published'}: {done.url}")


@_command(
    "measure again every number on the card of a published model. The exit status is 1 if one does not match",
    "timm-sugar verify me/resnet18_sugar_bsilu.digits --data digits",
    _argument("model", "ORG/NAME on the Hub, or the folder of a published model or of a run", metavar="REPO_OR_FOLDER"),
    *_DATA,
    _argument("--revision", "branch, tag or commit of the repository"),
    _JSON,
)
def _verify(args: argparse.Namespace) -> int:
    found = hub.verify(args.model, args.data, args.label_column, args.revision, args.image_column, show_progress=True)
    if args.json:
        keys = ("label", "place", "claimed", "measured", "holds")
        claims = [{key: getattr(claim, key) for key in keys} for claim in found.claims]
        print(json.dumps(dict(claims=claims, images=found.images, holds=found.holds), indent=2))
    else:

        def percent(value: float | None) -> str:
            return "-" if value is None else f"{100 * value:.2f}"

        rows = [(c.label, c.place, percent(c.claimed), percent(c.measured)) for c in found.claims]
        print_table(("claim", "of the card's", "claimed (%)", "measured (%)"), rows, left=(0, 1))
        print(f"{found.images:,} test images")
    for what, wrong in (
        ("does not have what it claims", [c for c in found.claims if not c.holds and c.measured is not None]),
        ("claims what could not be measured on this data", [c for c in found.claims if c.measured is None]),
    ):
        if wrong:
            names = ", ".join(f"{claim.label} ({claim.place})" for claim in wrong)
            print(f"timm-sugar verify: error: {args.model} {what}: {names}", file=sys.stderr)
    return 0 if found.holds else 1


@_command(
    "count dead and always-active units, and how often the others are active, for each layer",
    "timm-sugar profile output/digits --data digits",
    _argument("model", _MODEL, metavar="MODEL_OR_RUN"),
    *_DATA,
    _argument("--output", "folder for the results (default: the run's folder)", type=Path, metavar="DIR"),
    _JSON,
)
def _profile(args: argparse.Namespace) -> None:
    folder = args.output or _run_folder(args.model)
    if folder:
        from .analysis import plots  # fail early: matplotlib may be missing
    model = hub.find_model(args.model)
    network = model.load().to("cuda" if torch.cuda.is_available() else "cpu")
    source = model.load_any_data(args.data, args.label_column, args.image_column)
    split, images = model.validation_images(source)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the profile leaves out")
        found = profile(network, hub.image_batches(network, images))
    if found.unseen:
        print(f"timm-sugar profile: left out: {calls_summary(network, found.unseen)}", file=sys.stderr)
    gradients = None
    if network.num_classes == len(source.class_names) and {layer.kind for layer in found.layers} <= {"relu", "sugar"}:
        gradients = gradient_norms(network, *next(hub.image_batches(network, images)))
    own = Activation.of(network)
    result = dict(model=args.model, data=args.data, split=split, surrogate=own.surrogate, alpha=own.alpha)
    result |= found.to_dict() | {"gradients": gradients}
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "profile.json", json.dumps(result) + "\n")
        named = {Path(args.model).name: result}
        look = assign_styles([own.surrogate or found.layers[0].kind])
        plots.save(plots.activation_ridges(named, look), folder / "activation_profile")
        plots.save(plots.dead_units_by_layer({name: [result] for name in named}, look), folder / "dead_units")
        if gradients:
            plots.save(plots.gradient_norms_by_layer(gradients, own.surrogate or "relu"), folder / "gradient_norms")
    if args.json:
        print(json.dumps(result, indent=2))
        return
    head = ("layer", "activation", "units", "dead", "always active", "active (%)")
    table = [(x.name, x.kind, x.units, x.dead, x.always_active, f"{100 * (1 - x.sparsity):.1f}") for x in found.layers]
    units, dead, always = (sum(getattr(x, count) for x in found.layers) for count in ("units", "dead", "always_active"))
    table.append(("all", "", units, dead, always, f"{100 * (1 - found.sparsity):.1f}"))
    print_table(head, table, left=(0, 1))
    print(f"{100 * found.dead_units:.2f}% of the units are dead on {found.images:,} images of {split}")
    if folder:
        print(f"profile.json and pictures are in {folder}")


@_command(
    "measure the loss around trained networks along two random directions, and the sharpness",
    "timm-sugar landscape output/relu output/sugar --data cifar10 --output output/landscapes",
    _argument("models", _MODEL, metavar="RUN_OR_MODEL", nargs="+"),
    *_DATA,
    _argument("--resolution", "number of points per direction, odd (default: 25)", type=int, default=25),
    _argument("--limit", "number of training images, a stratified sample (default: 500)", type=int, default=500),
    _argument("--seed", "seed of the directions and of the sample (default: 0)", type=int, default=0),
    _argument("--output", "folder for results and a joint picture (default: run's folder)", type=Path, metavar="DIR"),
    _JSON,
)
def _landscape(args: argparse.Namespace) -> None:
    from .analysis.plots import landscape_contours, landscape_surfaces, save
    from .analysis.run import unique_names

    if args.limit < 1:
        raise ValueError(f"limit must be at least 1, got {args.limit}")
    models = [hub.find_model(name) for name in args.models]
    names = unique_names(args.models)
    folders = [_folder_of_results(args, model, name) for model, name in zip(models, names, strict=True)]
    rows = []
    pictures: dict[Path, dict[str, Any]] = {}
    for model, name, folder in zip(models, names, folders, strict=True):
        network = model.load().to("cuda" if torch.cuda.is_available() else "cpu")
        images = model.load_data(network, args.data, args.label_column, args.image_column).train
        batches = hub.sample_batches(network, images, args.limit, args.seed)
        folder.mkdir(parents=True, exist_ok=True)
        with progress_bars(f"{name}: landscape", f"{name}: sharpness") as (on_point, on_iteration):
            file = folder / "landscape.json"
            found = loss_landscape(network, batches, file, args.resolution, args.seed, on_point, on_iteration)
        rows.append(dict(model=name, folder=str(folder)) | summarise_landscape(found))
        pictures.setdefault(args.output or folder, {})[name] = found
    for folder, shown in pictures.items():
        save(landscape_contours(shown), folder / "landscape_contours")
        save(landscape_surfaces(shown), folder / "landscape_surface")
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    head = ("model", "loss at the centre", "highest loss", "sharpness", "iterations")
    table = []
    for row in rows:
        sharp = row["sharpness"]
        value = sharp.get("largest")
        largest = sharp.get("missing", "not finite") if value is None else f"{value:.4g} ± {sharp['residual']:.1g}"
        iterations = f"{sharp.get('iterations', '-')}{'' if sharp.get('converged', True) else ', not converged'}"
        table.append((row["model"], _number(row["centre_loss"]), _number(row["highest_loss"]), largest, iterations))
    print_table(head, table)
    print(f"pictures are in {', '.join(map(str, pictures))}")


@_command(
    "write an HTML report about one run or several, with pictures next to it",
    "timm-sugar report output/relu output/sugar --output output/report.html",
    _argument("runs", "folder of a run, finished or not, or of a comparison", metavar="RUN", nargs="+", type=Path),
    _argument("--output", "HTML file (default: report.html)", type=Path, metavar="FILE", default=Path("report.html")),
)
def _report(args: argparse.Namespace) -> None:
    from .analysis.report import write_report

    for path in write_report(args.runs, args.output):
        print(path)


@_command(
    "time a training step of a network with several activations, and measure the memory saved for the backward pass",
    "timm-sugar bench resnet18_sugar_bsilu --only gelu sugar sugar_uint8",
    _argument("model", "timm model name that takes act_layer, including our models", metavar="MODEL"),
    _argument("--img-size", "image size in pixels (default: 32)", type=int, default=32),
    _argument("--batch-size", "images per step (default: 128)", type=int, default=128),
    _argument("--surrogate", "SUGAR's surrogate (default: bsilu)", default="bsilu"),
    _argument("--only", "in addition to relu: " + ", ".join(activations("bsilu")), nargs="+", metavar="ACTIVATION"),
    _argument("--device", "device (default: the GPU if there is one)", choices=("cpu", "cuda")),
    _argument(
        "--precision",
        "bfloat16 and float16: autocast, in channels-last order (default: float32)",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
    ),
    _argument("--rounds", "timed steps per activation (default: 15)", type=int, default=15),
    _switch("--compile", "train through torch.compile"),
    _JSON,
)
def _bench(args: argparse.Namespace) -> None:
    for name in ("img_size", "batch_size", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU that torch can use; --device cpu")
    settings = dict(surrogate=args.surrogate, only=args.only, rounds=args.rounds, compiled=args.compile)
    rows = bench(args.model, args.img_size, args.batch_size, **settings, device=device, precision=args.precision)
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    head = ("activation", "ms a step", "images/s", "time / relu", "saved MiB", "saved / relu")
    formats = ("", ".1f", ",.0f", ".2f", ".1f", ".2f")
    print_table(head, [list(map(format, row.values(), formats)) for row in rows])


def _run_folder(model: str) -> Path | None:
    return Path(model) if Path(model, "config.yaml").is_file() else None


def _folder_of_results(args: argparse.Namespace, model: hub.NamedModel, name: str) -> Path:
    output: Path | None = args.output
    if output:
        return output / name.replace("/", "-") if len(args.models) > 1 else output
    if folder := _run_folder(model.name):
        return folder
    raise ValueError(f"{model.name} is no run's folder: say with --output where the results should go")


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
