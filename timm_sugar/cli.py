"""The command line: ``timm-sugar COMMAND``. A command is a function under ``@_command``, which says what it takes."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import timm
import torch
from huggingface_hub import get_token
from huggingface_hub.utils import disable_progress_bars
from timm.models import model_entrypoint

from . import __version__
from ._program import output_error
from .activations import calls_summary
from .analysis import gradient_norms, loss_landscape, profile, summarise_landscape
from .analysis.palette import assign_styles
from .analysis.speed import activations, bench
from .files import write_file
from .hub import (
    NamedModel,
    check_weights,
    find_model,
    image_batches,
    image_files,
    predict,
    publish,
    published_files,
    read_facts,
    sample_batches,
    summary_line,
    to_float16,
    verify,
    write_folder,
)
from .layers import Activation
from .models import is_own
from .models._weights import list_weights
from .terminal import Parser, print_table, progress_bars

Argument: TypeAlias = tuple[tuple[str, ...], dict[str, Any]]
Run: TypeAlias = Callable[[argparse.Namespace], int]


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        help: What it does, one line.
        example: A command line.
        arguments: What `argparse.ArgumentParser.add_argument` takes, for each argument.
        run: Takes them as parsed, prints its result and returns the exit status.
        passes: Whether it takes any other flag besides, as `args.others`.
    """

    help: str
    example: str
    arguments: tuple[Argument, ...]
    run: Run
    passes: bool = False


COMMANDS: dict[str, Command] = {}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: Arguments without the program's name; None takes those of this process.

    Returns:
        Exit status: 0 on success, 1 after a failure, which is one line on standard error. A usage error exits with 2.
    """
    args = _parse(argv)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        status = COMMANDS[args.command].run(args)
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
    parser = _parser()
    args, others = parser.parse_known_args(argv)
    if others and not COMMANDS[args.command].passes:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    args.others = others
    return args


def _parser() -> Parser:
    parser = Parser(prog="timm-sugar", description="Networks with SUGAR: look into them, publish and verify them.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.help.partition(". ")[0],
            description=command.help,
            epilog=f"example: {command.example}",
            allow_abbrev=not command.passes,  # else a flag of the trainer may pass for one of the command
        )
        for flags, options in command.arguments:
            sub.add_argument(*flags, **options)
        sub.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def _without_token(text: str) -> str:
    """Return text without the Hub's token, which a library may have put into an error."""
    token = get_token()
    return text.replace(token, "***") if token else text


def _command(help: str, example: str, *arguments: Argument, passes: bool = False) -> Callable[[Run], Run]:
    """Register a function ``_NAME`` as the subcommand NAME."""

    def register(run: Run) -> Run:
        COMMANDS[run.__name__.removeprefix("_")] = Command(help, example, arguments, run, passes)
        return run

    return register


def _argument(*flags: str, **options: Any) -> Argument:
    return flags, options


def _switch(flag: str, help: str) -> Argument:
    return _argument(flag, action="store_true", help=help)


_MODEL = "run's or published folder, ORG/NAME, or a model's name"
_DATA = (
    _argument("--data", required=True, help="digits, cifar10, cifar100, tiny-imagenet, a Hub id or a folder"),
    _argument("--label-column", help="column of the class labels; default: the one that the card names"),
    _argument("--image-column", help="column of the images; likewise"),
)
_JSON = _switch("--json", "print the result as JSON")


@_command(
    "list the models of this package: parameters, activation, and the tags of weights with where they come from",
    "timm-sugar models --json",
    _JSON,
)
def _models(args: argparse.Namespace) -> int:
    rows = []
    for name in timm.list_models():
        if is_own(name):
            model = model_entrypoint(name)(device="meta")
            own = Activation.of(model)
            alpha = "" if own.alpha is None else f" {own.alpha:g}"
            activation = f"SUGAR {own.surrogate}{alpha}" if own.surrogate else "GELU"
            parameters = sum(p.numel() for p in model.parameters())
            rows.append(dict(name=name, parameters=parameters, activation=activation, weights=list_weights(name)))
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        table = []
        for row in rows:
            weights = [f"{tag} ({source.removeprefix('local-dir:')})" for tag, source in row["weights"].items()]
            table.append((row["name"], f"{row['parameters']:,}", row["activation"], ", ".join(weights) or "-"))
        print_table(("model", "parameters", "activation", "weights"), table, left=(0, 2, 3))
    return 0


@_command(
    "name the classes of images; exit status 1 where a file cannot be read, which does not stop the others",
    "timm-sugar predict photo.jpg path/to/folder --model output/digits --top 3",
    _argument("images", metavar="IMAGE_OR_FOLDER", nargs="+", help="files, and folders, of any depth, with images"),
    _argument("--model", required=True, help=f"{_MODEL}; local-dir:FOLDER and hf-hub:ORG/NAME too"),
    _argument("--top", type=int, default=5, metavar="N", help="classes of each image (default: 5)"),
    _switch("--json", "print a JSON object a line: file, and classes (number, name, probability) or error"),
)
def _predict(args: argparse.Namespace) -> int:
    if args.top < 1:
        raise ValueError(f"top must be at least 1, got {args.top}")
    files = image_files(args.images)
    network = find_model(args.model).load().to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{args.model}: {summary_line(network)}", file=sys.stderr)
    failed = []
    with progress_bars("images") as (on_image,):
        for done, found in enumerate(predict(network, files, args.top), 1):
            if found.error:
                failed.append(found)
            if args.json:
                classes = [dict(number=k, name=name, probability=value) for k, name, value in found.classes]
                print(
                    json.dumps(
                        dict(file=found.file) | (dict(error=found.error) if found.error else dict(classes=classes))
                    )
                )
            elif not found.error:
                print(f"{found.file}: {', '.join(f'{name} {100 * value:.1f}%' for _, name, value in found.classes)}")
            on_image(done, len(files))
    for found in failed:
        print(f"timm-sugar predict: {found.file} {found.error}", file=sys.stderr)
    if failed:
        print(f"timm-sugar predict: error: {len(failed)} of {len(files)} files gave no class", file=sys.stderr)
    return 1 if failed else 0


@_command(
    "train a network with its own activation, or ReLU, and with SUGAR, over learning rates and seeds, and say whether "
    "that shows a difference. Stop it at any time: the same command goes on. Rates, surrogates and seeds may be added "
    "later. Every other flag is one of the trainer's, such as --epochs, and holds for all runs",
    "timm-sugar compare --data path/to/folder --model resnet18 --lrs 0.001 0.003 --seeds 3 --minutes 60",
    _argument("--data", required=True, help="digits, cifar10, cifar100, tiny-imagenet, a Hub id or a folder"),
    _argument("--output", type=Path, default=Path("output/compare"), metavar="DIR", help="default: output/compare"),
    _argument("--surrogates", nargs="+", metavar="NAME", help="default: bsilu nelu"),
    _argument("--lrs", nargs="+", type=float, metavar="RATE", help="learning rates (default: 0.0003 0.001 0.003)"),
    _argument("--seeds", type=int, metavar="N", help="seeds of each, from 0 on (default: 3)"),
    _argument(
        "--minutes", type=float, default=math.inf, metavar="M", help="stop after so many; the same command goes on"
    ),
    _argument("--jobs", type=int, metavar="N", help="runs at once (default: one a CPU core, or one on a GPU)"),
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
        return os.EX_TEMPFAIL  # as a sweep that --minutes ends
    return 0


@_command(
    "publish a finished run on the Hub, in one commit",
    "timm-sugar publish output/digits --repo-id me/resnet18_sugar_bsilu.digits --dry-run",
    _argument("output", metavar="OUTPUT", type=Path, help="folder of a finished run, or one of --to-folder"),
    _argument("--repo-id", required=True, metavar="ORG/NAME", help="repository; created if need be"),
    _argument(
        "--facts",
        type=Path,
        metavar="YAML",
        help="what the card says besides the run's numbers (default: facts.yaml in OUTPUT or DIR, where there is one)",
    ),
    _switch(
        "--half",
        "store weights in float16, but for 1-D tensors, and claim the accuracy of that file, measured in timm and "
        "in transformers",
    ),
    _argument("--data", help="where the test images are now (default: where they were in training)"),
    _argument("--to-folder", type=Path, metavar="DIR", help="write the files into DIR, and send nothing"),
    _switch("--private", "create a private repository"),
    _argument("--revision", metavar="BRANCH", help="branch to commit to; created if need be"),
    _switch("--create-pr", "open a pull request instead of committing"),
    _switch("--dry-run", "check the run, show what would go up, and stop"),
)
def _publish(args: argparse.Namespace) -> int:
    if args.to_folder and (args.private or args.revision or args.create_pr):
        raise ValueError("--to-folder sends nothing, so --private, --revision and --create-pr are not for it")
    beside = (folder / "facts.yaml" for folder in (args.output, args.to_folder) if folder)
    path = args.facts or next((path for path in beside if path.is_file()), None)
    facts = read_facts(path) if path else None
    with tempfile.TemporaryDirectory() as place:
        output = args.output
        if args.half:
            output = to_float16(output, Path(place, "run"), args.data)
        files = published_files(output, args.repo_id, facts)
        print(check_weights(output, args.data))
        if args.to_folder and not args.dry_run:
            files = write_folder(output, args.repo_id, args.to_folder, facts)
        if args.dry_run or args.to_folder:
            sizes = {n: c.stat().st_size if isinstance(c, Path) else len(c) for n, c in sorted(files.items())}
            print_table(("file", "bytes"), [(name, f"{size:,}") for name, size in sizes.items()])
            where = args.to_folder or args.repo_id
            print(f"nothing was sent; without --dry-run these go to {where}" if args.dry_run else f"written to {where}")
            return 0
        done = publish(files, args.repo_id, args.private, args.revision, args.create_pr, print)
    print(f"{'published' if done.changed else 'nothing has changed since it was published'}: {done.url}")
    return 0


@_command(
    "measure again every number that the card of a published model claims; exit status 1 where one does not hold",
    "timm-sugar verify me/resnet18_sugar_bsilu.digits --data digits",
    _argument("model", metavar="REPO_OR_FOLDER", help="ORG/NAME on the Hub, a published folder, or a run's"),
    *_DATA,
    _argument("--revision", help="branch, tag or commit of the repository"),
    _JSON,
)
def _verify(args: argparse.Namespace) -> int:
    found = verify(args.model, args.data, args.label_column, args.revision, args.image_column, show_progress=True)
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
    "count dead and always-active units, and how often the others are active, layer by layer",
    "timm-sugar profile output/digits --data digits",
    _argument("model", metavar="MODEL_OR_RUN", help=_MODEL),
    *_DATA,
    _argument("--output", type=Path, metavar="DIR", help="folder of the results; default: the run's own"),
    _JSON,
)
def _profile(args: argparse.Namespace) -> int:
    folder = args.output or (Path(args.model) if Path(args.model, "config.yaml").is_file() else None)
    if folder:
        from .analysis import plots  # before the work: matplotlib may be missing
    model = find_model(args.model)
    network = model.load().to("cuda" if torch.cuda.is_available() else "cpu")
    source = model.load_any_data(args.data, args.label_column, args.image_column)
    split, images = model.validation_images(source)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the profile leaves out")
        found = profile(network, image_batches(network, images))
    if found.unseen:
        print(f"timm-sugar profile: left out: {calls_summary(network, found.unseen)}", file=sys.stderr)
    gradients = None
    if network.num_classes == len(source.class_names) and {layer.kind for layer in found.layers} <= {"relu", "sugar"}:
        gradients = gradient_norms(network, *next(image_batches(network, images)))
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
        return 0
    head = ("layer", "activation", "units", "dead", "always active", "active (%)")
    table = [(x.name, x.kind, x.units, x.dead, x.always_active, f"{100 * (1 - x.sparsity):.1f}") for x in found.layers]
    units, dead, always = (sum(getattr(x, count) for x in found.layers) for count in ("units", "dead", "always_active"))
    table.append(("all", "", units, dead, always, f"{100 * (1 - found.sparsity):.1f}"))
    print_table(head, table, left=(0, 1))
    print(f"{100 * found.dead_units:.2f}% of the units are dead on {found.images:,} images of {split}")
    if folder:
        print(f"profile.json and pictures are in {folder}")
    return 0


@_command(
    "measure the loss around trained networks along two random directions, and its sharpness",
    "timm-sugar landscape output/relu output/sugar --data cifar10 --output output/landscapes",
    _argument("models", metavar="RUN_OR_MODEL", nargs="+", help=_MODEL),
    *_DATA,
    _argument("--resolution", type=int, default=25, help="points in each direction, odd (default: 25)"),
    _argument("--limit", type=int, default=500, help="training images, a stratified sample (default: 500)"),
    _argument("--seed", type=int, default=0, help="of the directions and of the sample (default: 0)"),
    _argument(
        "--output", type=Path, metavar="DIR", help="folder of results and a common picture; default: each run's own"
    ),
    _JSON,
)
def _landscape(args: argparse.Namespace) -> int:
    from .analysis.plots import landscape_contours, landscape_surfaces, save
    from .analysis.run import unique_names

    if args.limit < 1:
        raise ValueError(f"limit must be at least 1, got {args.limit}")
    models = [find_model(name) for name in args.models]
    names = unique_names(args.models)
    folders = [_folder_of_results(args, model, name) for model, name in zip(models, names, strict=True)]
    found = {}
    for model, name, folder in zip(models, names, folders, strict=True):
        network = model.load().to("cuda" if torch.cuda.is_available() else "cpu")
        images = model.load_data(network, args.data, args.label_column, args.image_column).train
        batches = sample_batches(network, images, args.limit, args.seed)
        folder.mkdir(parents=True, exist_ok=True)
        with progress_bars(f"{name}: landscape", f"{name}: sharpness") as (on_point, on_iteration):
            file = folder / "landscape.json"
            found[name] = loss_landscape(network, batches, file, args.resolution, args.seed, on_point, on_iteration)
    each_its_own = {folder: {name: found[name]} for name, folder in zip(names, folders, strict=True)}
    pictures = {args.output: found} if args.output else each_its_own
    for folder, shown in pictures.items():
        save(landscape_contours(shown), folder / "landscape_contours")
        save(landscape_surfaces(shown), folder / "landscape_surface")
    rows = [
        dict(model=name, folder=str(folder)) | summarise_landscape(found[name])
        for name, folder in zip(names, folders, strict=True)
    ]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    head = ("model", "loss at the centre", "highest loss", "sharpness", "iterations")
    table = []
    for row in rows:
        sharp = row["sharpness"]
        value = sharp.get("largest")
        largest = sharp.get("missing", "not finite") if value is None else f"{value:.4g} ± {sharp['residual']:.1g}"
        iterations = f"{sharp.get('iterations', '-')}{'' if sharp.get('converged', True) else ', not converged'}"
        table.append((row["model"], _number(row["centre_loss"]), _number(row["highest_loss"]), largest, iterations))
    print_table(head, table)
    print(f"pictures are in {', '.join(str(folder) for folder in pictures)}")
    return 0


@_command(
    "write a page about a run, or several compared, and pictures beside it",
    "timm-sugar report output/relu output/sugar --output output/report.html",
    _argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, finished or not, or of a comparison"),
    _argument(
        "--output", type=Path, metavar="FILE", default=Path("report.html"), help="the page (default: report.html)"
    ),
)
def _report(args: argparse.Namespace) -> int:
    from .analysis.report import write_report

    for path in write_report(args.runs, args.output):
        print(path)
    return 0


@_command(
    "time a training step of a network with several activations, and count the memory kept for the backward",
    "timm-sugar bench resnet18_sugar_bsilu --only gelu sugar sugar_uint8",
    _argument("model", metavar="MODEL", help="model of timm's registry that takes act_layer, ours included"),
    _argument("--img-size", type=int, default=32, help="side of the images, pixels (default: 32)"),
    _argument("--batch-size", type=int, default=128, help="images in a step (default: 128)"),
    _argument("--surrogate", default="bsilu", help="SUGAR's surrogate (default: bsilu)"),
    _argument("--only", nargs="+", metavar="ACTIVATION", help="beside relu: " + ", ".join(activations("bsilu"))),
    _argument("--device", choices=("cpu", "cuda"), help="where (default: the GPU where there is one)"),
    _argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="bfloat16 and float16: autocast, in channels-last order (default: float32)",
    ),
    _argument("--rounds", type=int, default=15, help="steps timed with each activation (default: 15)"),
    _switch("--compile", "train through torch.compile"),
    _JSON,
)
def _bench(args: argparse.Namespace) -> int:
    for name in ("img_size", "batch_size", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU that torch can use; --device cpu")
    settings = dict(surrogate=args.surrogate, only=args.only, rounds=args.rounds, compiled=args.compile)
    settings |= dict(device=device, precision=args.precision)
    rows = bench(args.model, args.img_size, args.batch_size, **settings)
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    head = ("activation", "ms a step", "images/s", "time / relu", "saved MiB", "saved / relu")
    formats = ("", ".1f", ",.0f", ".2f", ".1f", ".2f")
    table = [[format(value, spec) for value, spec in zip(row.values(), formats, strict=True)] for row in rows]
    print_table(head, table)
    return 0


def _folder_of_results(args: argparse.Namespace, model: NamedModel, name: str) -> Path:
    output: Path | None = args.output
    if output:
        return output / name.replace("/", "-") if len(args.models) > 1 else output
    if (Path(model.name) / "config.yaml").is_file():
        return Path(model.name)
    raise ValueError(f"{model.name} is no run's folder: say with --output where the results should go")


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
