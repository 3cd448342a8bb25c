"""The command line: ``timm-sugar COMMAND``. A command is an entry in COMMANDS: what it takes, and what it does."""

import argparse
import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import timm
import torch
from huggingface_hub import get_token
from huggingface_hub.utils import disable_progress_bars
from timm.models import model_entrypoint

from . import __version__
from .activations import calls_summary
from .analysis import gradient_norms, loss_landscape, profile, summarise_landscape
from .analysis.speed import activations, bench
from .files import write_file
from .hub import (
    NamedModel,
    check_weights,
    files_of_run,
    find_model,
    halve,
    image_batches,
    publish,
    read_facts,
    sample_batches,
    surrogate_of,
    verify,
    write_folder,
)
from .models import is_own
from .models._weights import list_tags


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        help: What it does, one line.
        example: A command line.
        arguments: Adds its arguments to a parser.
        run: Takes them as parsed, prints its result and returns the exit status.
    """

    help: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: Arguments without the program's name; None takes those of this process.

    Returns:
        Exit status: 0 on success, 1 after a failure, which is one line on standard error. A usage error exits with 2.
    """
    args = _parser().parse_args(argv)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return COMMANDS[args.command].run(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        lines = traceback.format_exc() if args.debug else ""
        message = " ".join(str(error).split()) or type(error).__name__
        print(_without_token(f"{lines}timm-sugar {args.command}: error: {message}"), file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="timm-sugar", description="Networks with SUGAR: look into them, publish and verify them.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name, help=command.help, description=command.help, epilog=f"example: {command.example}"
        )
        command.arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def _without_token(text: str) -> str:
    """Return text without the Hub's token, which a library may have put into an error."""
    token = get_token()
    return text.replace(token, "***") if token else text


def _models_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a list of objects")


def _models(args: argparse.Namespace) -> int:
    rows = []
    for name in timm.list_models():
        if is_own(name):
            model = model_entrypoint(name)(device="meta")
            surrogate, alpha = surrogate_of(model)
            activation = f"SUGAR {surrogate}{'' if alpha is None else f' {alpha:g}'}" if surrogate else "GELU"
            parameters = sum(p.numel() for p in model.parameters())
            rows.append(dict(name=name, parameters=parameters, activation=activation, weights=list_tags(name)))
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        table = [(r["name"], f"{r['parameters']:,}", r["activation"], ", ".join(r["weights"]) or "-") for r in rows]
        _print_table([("model", "parameters", "activation", "weights"), *table], right={1})
    return 0


def _publish_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder of a finished run, or one of --to-folder")
    parser.add_argument("--repo-id", required=True, metavar="ORG/NAME", help="repository; created if need be")
    parser.add_argument(
        "--facts",
        type=Path,
        metavar="YAML",
        help="what the card says besides the run's numbers (default: facts.yaml in OUTPUT or DIR, where there is one)",
    )
    parser.add_argument(
        "--half",
        action="store_true",
        help="store weights in float16, but for 1-D tensors, and claim the accuracy of that file, measured in timm and "
        "in transformers",
    )
    parser.add_argument("--data", help="where the test images are now (default: where they were in training)")
    parser.add_argument("--to-folder", type=Path, metavar="DIR", help="write the files into DIR, and send nothing")
    parser.add_argument("--private", action="store_true", help="nobody else may see the repository")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to; created if need be")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--dry-run", action="store_true", help="check the run, show what would go up, and stop")


def _publish(args: argparse.Namespace) -> int:
    if args.to_folder and (args.private or args.revision or args.create_pr):
        raise ValueError("--to-folder sends nothing, so --private, --revision and --create-pr are not for it")
    beside = (folder / "facts.yaml" for folder in (args.output, args.to_folder) if folder)
    path = args.facts or next((path for path in beside if path.is_file()), None)
    facts = read_facts(path) if path else None
    with tempfile.TemporaryDirectory() as place:
        output = args.output
        if args.half:
            output = halve(output, Path(place, "run"), args.data)
        files = files_of_run(output, args.repo_id, facts)
        print(check_weights(output, args.data))
        if args.to_folder and not args.dry_run:
            files = write_folder(output, args.repo_id, args.to_folder, facts)
        if args.dry_run or args.to_folder:
            sizes = {n: c.stat().st_size if isinstance(c, Path) else len(c) for n, c in sorted(files.items())}
            _print_table([("file", "bytes"), *((name, f"{size:,}") for name, size in sizes.items())], right={1})
            where = args.to_folder or args.repo_id
            print(f"nothing was sent; without --dry-run these go to {where}" if args.dry_run else f"written to {where}")
            return 0
        done = publish(files, args.repo_id, args.private, args.revision, args.create_pr)
    print(f"{'published' if done.changed else 'nothing has changed since it was published'}: {done.url}")
    return 0


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="REPO_OR_FOLDER", help="ORG/NAME on the Hub, a published folder, or a run's")
    parser.add_argument("--data", required=True, help="digits, cifar10, cifar100, tiny-imagenet, a Hub id or a folder")
    parser.add_argument("--label-column", help="column of the class labels; default: the one that the card names")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--json", action="store_true", help="print an object")


def _verify(args: argparse.Namespace) -> int:
    found = verify(args.model, args.data, args.label_column, args.revision)
    if args.json:
        result = dict(claimed=found.claimed, measured=found.measured, images=found.images, holds=found.holds)
        print(json.dumps(result, indent=2))
    else:
        _print_table(
            [
                ("top-1 accuracy", "percent"),
                ("claimed by the card", f"{100 * found.claimed:.2f}"),
                (f"measured on {found.images:,} images", f"{100 * found.measured:.2f}"),
            ],
            right={1},
        )
    if not found.holds:
        print(f"timm-sugar verify: error: {args.model} does not have the accuracy that it claims", file=sys.stderr)
    return 0 if found.holds else 1


def _profile_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_OR_RUN", help="run's or published folder, ORG/NAME, or a model's name")
    parser.add_argument("--data", required=True, help="digits, cifar10, cifar100, tiny-imagenet, a Hub id or a folder")
    parser.add_argument("--label-column", help="column of the class labels; default: the one that the card names")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the results; default: the run's own")
    parser.add_argument("--json", action="store_true", help="print an object")


def _profile(args: argparse.Namespace) -> int:
    folder = args.output or (Path(args.model) if Path(args.model, "config.yaml").is_file() else None)
    if folder:
        from .analysis import run_plots  # before the work, lest matplotlib be missing after it
        from .analysis.plots import save
    model = find_model(args.model)
    network = model.load().to("cuda" if torch.cuda.is_available() else "cpu")
    source = model.load_any_data(args.data, args.label_column)
    split, images = model.validation_images(source)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the profile leaves out")
        found = profile(network, image_batches(network, images))
    if found.unseen:
        print(f"timm-sugar profile: left out: {calls_summary(network, found.unseen)}", file=sys.stderr)
    gradients = None
    if network.num_classes == len(source.class_names) and {layer.kind for layer in found.layers} <= {"relu", "sugar"}:
        gradients = gradient_norms(network, *next(image_batches(network, images)))
    surrogate, alpha = surrogate_of(network)
    result = dict(model=args.model, data=args.data, split=split, surrogate=surrogate, alpha=alpha)
    result |= found.to_dict() | {"gradients": gradients}
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "profile.json", json.dumps(result) + "\n")
        named = {Path(args.model).name: result}
        save(run_plots.activation_ridges(named), folder / "activation_profile")
        save(run_plots.dead_units_by_layer(named), folder / "dead_units")
        if gradients:
            save(run_plots.gradient_norms_by_layer(gradients), folder / "gradient_norms")
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    head = ("layer", "activation", "units", "dead", "always active", "active (%)")
    table = [(x.name, x.kind, x.units, x.dead, x.always_active, f"{100 * (1 - x.sparsity):.1f}") for x in found.layers]
    units, dead, always = (sum(getattr(x, count) for x in found.layers) for count in ("units", "dead", "always_active"))
    table.append(("all", "", units, dead, always, f"{100 * (1 - found.sparsity):.1f}"))
    _print_table([head, *(tuple(map(str, row)) for row in table)], right={2, 3, 4, 5})
    print(f"{100 * found.dead_units:.2f}% of the units are dead on {found.images:,} images of {split}")
    if folder:
        print(f"profile.json and pictures are in {folder}")
    return 0


def _landscape_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", metavar="RUN_OR_MODEL", nargs="+", help="run's or published folder, ORG/NAME, or a model's name"
    )
    parser.add_argument("--data", required=True, help="digits, cifar10, cifar100, tiny-imagenet, a Hub id or a folder")
    parser.add_argument("--label-column", help="column of the class labels; default: the one that the card names")
    parser.add_argument("--resolution", type=int, default=25, help="points in each direction, odd (default: 25)")
    parser.add_argument("--limit", type=int, default=500, help="training images, a stratified sample (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the directions and of the sample (default: 0)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of results and a common picture; default: each run's own",
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects")


def _landscape(args: argparse.Namespace) -> int:
    from .analysis.landscape_plots import landscape_contours, landscape_surfaces
    from .analysis.plots import save
    from .analysis.report import unique_names

    if args.limit < 1:
        raise ValueError(f"limit must be at least 1, got {args.limit}")
    models = [find_model(name) for name in args.models]
    names = unique_names(args.models)
    folders = [_folder_of_results(args, model, name) for model, name in zip(models, names, strict=True)]
    found = {}
    for model, name, folder in zip(models, names, folders, strict=True):
        network = model.load().to("cuda" if torch.cuda.is_available() else "cpu")
        images = model.load_data(network, args.data, args.label_column).train
        batches = sample_batches(network, images, args.limit, args.seed)
        folder.mkdir(parents=True, exist_ok=True)
        with _progress(f"{name}: landscape", f"{name}: sharpness") as (on_point, on_iteration):
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
    _print_table([head, *table], right={1, 2, 3, 4})
    print(f"pictures are in {', '.join(str(folder) for folder in pictures)}")
    return 0


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, finished or not")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", default=Path("report.html"), help="the page (default: report.html)"
    )


def _report(args: argparse.Namespace) -> int:
    from .analysis.report import write_report

    for path in write_report(args.runs, args.output):
        print(path)
    return 0


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model of timm's registry that takes act_layer, ours included")
    parser.add_argument("--img-size", type=int, default=32, help="side of the images, pixels (default: 32)")
    parser.add_argument("--batch-size", type=int, default=128, help="images in a step (default: 128)")
    parser.add_argument("--surrogate", default="bsilu", help="SUGAR's surrogate (default: bsilu)")
    parser.add_argument(
        "--only", nargs="+", metavar="ACTIVATION", help="beside relu: " + ", ".join(activations("bsilu"))
    )
    parser.add_argument("--rounds", type=int, default=15, help="steps timed with each activation (default: 15)")
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    parser.add_argument("--json", action="store_true", help="print a list of objects")


def _bench(args: argparse.Namespace) -> int:
    for name in ("img_size", "batch_size", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = dict(surrogate=args.surrogate, only=args.only, rounds=args.rounds, compiled=args.compile, device=device)
    rows = bench(args.model, args.img_size, args.batch_size, **settings)
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    head = ("activation", "ms a step", "images/s", "time / relu", "saved MiB", "saved / relu")
    formats = ("", ".1f", ",.0f", ".2f", ".1f", ".2f")
    table = [[format(value, spec) for value, spec in zip(row.values(), formats, strict=True)] for row in rows]
    _print_table([head, *table], right={1, 2, 3, 4, 5})
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


@contextmanager
def _progress(*tasks: str) -> Iterator[list[Callable[[int, int], None]]]:
    """Show a bar for each task on a terminal; yield for each a function that takes the steps done and in all."""
    import rich.progress as bars
    from rich.console import Console

    with bars.Progress(
        *bars.Progress.get_default_columns(), console=Console(stderr=True), disable=not sys.stderr.isatty()
    ) as progress:

        def updater(task: bars.TaskID) -> Callable[[int, int], None]:
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield [updater(progress.add_task(task, total=None)) for task in tasks]


def _print_table(rows: Sequence[Sequence[str]], right: set[int]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        print("  ".join(cells).rstrip())


COMMANDS = {
    "models": Command(
        "list the models of this package: parameters, activation, and the tags of published weights",
        "timm-sugar models --json",
        _models_arguments,
        _models,
    ),
    "profile": Command(
        "count dead and always-active units, and how often the others are active, layer by layer",
        "timm-sugar profile output/digits --data digits",
        _profile_arguments,
        _profile,
    ),
    "landscape": Command(
        "measure the loss around trained networks along two random directions, and its sharpness",
        "timm-sugar landscape output/relu output/sugar --data cifar10 --output output/landscapes",
        _landscape_arguments,
        _landscape,
    ),
    "bench": Command(
        "time a training step of a network with several activations, and count the memory kept for the backward",
        "timm-sugar bench resnet18_sugar_bsilu --only gelu sugar sugar_uint8",
        _bench_arguments,
        _bench,
    ),
    "publish": Command(
        "publish a finished run on the Hub, in one commit",
        "timm-sugar publish output/digits --repo-id me/resnet18_sugar_bsilu.digits --dry-run",
        _publish_arguments,
        _publish,
    ),
    "report": Command(
        "write a page about a run, or several compared, and pictures beside it",
        "timm-sugar report output/relu output/sugar --output output/report.html",
        _report_arguments,
        _report,
    ),
    "verify": Command(
        "measure again the accuracy that the card of a published model claims; exit status 1 where it is another",
        "timm-sugar verify me/resnet18_sugar_bsilu.digits --data digits",
        _verify_arguments,
        _verify,
    ),
}

if __name__ == "__main__":
    sys.exit(main())
