"""Entry points: `train` for Python, `main` for the command line."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from .._program import output_error
from ..files import to_json
from ..hub import check_destination, check_weights, publish, published_files
from ..settings import TrainConfig
from .config import load_config
from .dry_run import dry_run, evaluate_only
from .folder import check_writable, finished_summary, use_recorded_statistics
from .processes import Stopped, folder_lock, process_state, resume_command
from .train import build, fit


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, or resume the run in `config.output`, and return its summary.

    With `config.dry_run` or `config.eval_only` nothing is trained; the return value is then the estimated cost of the
    run, or the metrics of its weights.

    Examples:
        >>> config = TrainConfig(data="digits", epochs=2, output="output/digits")
        >>> summary = train(config)  # doctest: +SKIP

    Raises:
        ValueError, OSError, ModuleNotFoundError: the settings, the data or the output folder are invalid; raised
            before training starts.
        Stopped: SIGTERM or SIGINT was received; the same call resumes the run.
        FloatingPointError: the loss is not finite.
        OSError: a checkpoint cannot be written; the last good one is kept.
    """
    with _prepared(config) as run:
        return run()


@contextmanager
def _prepared(config: TrainConfig) -> Iterator[Callable[[], dict[str, Any]]]:
    """Lock the run's folder, validate the settings, build the run, and yield the function that trains."""
    writes = not (config.eval_only or config.dry_run)
    if writes:
        check_writable(config.folder)
    with folder_lock(config.folder) if writes else nullcontext():
        if config.push_to_hub and _is_main():
            check_destination(config.push_to_hub)
        if config.eval_only:
            yield partial(evaluate_only, build(use_recorded_statistics(config)))
        elif config.dry_run:
            yield partial(dry_run, build(config))
        else:
            summary = finished_summary(config)
            yield partial(_publish, config, partial(dict, summary) if summary else partial(fit, build(config)))


def _publish(config: TrainConfig, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run, then publish the result to `config.push_to_hub`; an identical repository is not changed."""
    summary = run()
    if config.push_to_hub and _is_main():
        check_weights(config.folder)
        files = published_files(config.folder, config.push_to_hub)
        publish(files, config.push_to_hub, announce=partial(print, file=sys.stderr))
    return summary


def main(script: str, description: str, recipe: str) -> None:
    """Run a training script: read the command line, train, print the summary as JSON.

    Args:
        script: The script's ``__file__``.
        description: Its docstring, for --help.
        recipe: Its default recipe.

    On errors and signals it exits as described in `one_line_errors`.
    """
    prog = Path(script).name
    with ExitStack() as held:
        with one_line_errors(prog, before_training=True):
            run = held.enter_context(_prepared(load_config(sys.argv[1:], prog, description, recipe)))
        with one_line_errors(prog):
            summary = run()
    if _is_main():
        print(to_json(summary))
        if problem := output_error():
            print(f"{prog}: the summary cannot be printed: {problem}", file=sys.stderr)
    process_state().destroy_process_group()


@contextmanager
def one_line_errors(prog: str, before_training: bool = False) -> Iterator[None]:
    """Convert exceptions of `train` to one line on standard error and an exit status of the command `prog`.

    The status is 2 if settings, data or a checkpoint are invalid or missing; 1 if the loss is not finite or a file
    cannot be read or written (2 with `before_training`); 143 or 130 if SIGTERM or Ctrl-C stopped the run.
    """
    try:
        yield
    except Stopped as stopped:
        _exit(f"{prog}: {stopped}; saved; resume with: {resume_command()}", 128 + stopped.signum)
    except KeyboardInterrupt:  # before training there is nothing to save
        raise SystemExit(130) from None
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        wrong_input = before_training or type(error) in (ValueError, ModuleNotFoundError, FileNotFoundError)
        _exit(f"{prog}: error: {' '.join(str(error).split())}", 2 if wrong_input else 1)


def _exit(line: str, status: int) -> NoReturn:
    if _is_main():
        print(line, file=sys.stderr)
    raise SystemExit(status) from None


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
