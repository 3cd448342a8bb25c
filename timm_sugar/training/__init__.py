"""Training: what the scripts in train/ call."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from ..hub import check_destination, check_weights, files_of_run, publish
from ..settings import TrainConfig
from .build import prepare
from .config import load_config
from .loop import fit
from .processes import Stopped, process_state, resume_command, sole_use
from .results import check_writable, finished_summary, use_recorded_statistics
from .trials import dry_run, evaluate_only

__all__ = ["Stopped", "TrainConfig", "load_config", "main", "one_line_errors", "train"]


def train(config: TrainConfig) -> dict[str, Any]:
    """Train as configured, or go on where the run in `config.output` stopped, and return its summary.

    With `config.dry_run` or `config.eval_only` nothing is trained, and what the run will take, or how good its
    weights are, is returned instead.

    Raises:
        ValueError, OSError, ModuleNotFoundError: something is wrong with the settings, the data or the output
            folder; raised before anything is trained.
        Stopped: SIGTERM or SIGINT came; the same call goes on with the run.
        FloatingPointError: the loss is not finite.
        OSError: a checkpoint cannot be written; the last good one stays.
    """
    with _hold(config):
        action, argument = _plan(config)
        summary = action(argument)
    _push(config)
    return summary


def _hold(config: TrainConfig) -> AbstractContextManager[None]:
    """Make the folder of a run that writes into it, and keep other processes from it."""
    if config.eval_only or config.dry_run:
        return nullcontext()
    check_writable(config.folder)
    return sole_use(config.folder)


def _push(config: TrainConfig) -> None:
    """Publish a finished run where it is to be; one that is there already is left as it is."""
    if config.push_to_hub and not (config.eval_only or config.dry_run) and _is_main():
        check_weights(config.folder)
        publish(files_of_run(config.folder, config.push_to_hub), config.push_to_hub)


def _plan(config: TrainConfig) -> tuple[Callable[[Any], dict[str, Any]], Any]:
    """Do all that can fail before training, and return what is left to call, with its argument."""
    if config.push_to_hub and _is_main():
        check_destination(config.push_to_hub)
    if config.eval_only:
        return evaluate_only, prepare(use_recorded_statistics(config))
    if config.dry_run:
        return dry_run, prepare(config)
    summary = finished_summary(config)
    return (dict, summary) if summary else (fit, prepare(config))


def main(script: str, description: str, recipe: str) -> None:
    """Run a training script: read the command line, train, print the summary as JSON.

    Args:
        script: The script's ``__file__``.
        description: Its docstring, for --help.
        recipe: Its default recipe.

    Exits with one line on standard error: with status 2 where the settings, the data or the output folder are wrong,
    with 1 where the loss is not finite or a checkpoint cannot be written, and with 143 or 130 where SIGTERM or Ctrl-C
    stopped it, after saving.
    """
    prog = Path(script).name
    with ExitStack() as held:
        with one_line_errors(prog, before_training=True):
            config = load_config(sys.argv[1:], prog, description, recipe)
            held.enter_context(_hold(config))
            action, argument = _plan(config)
        with one_line_errors(prog):
            summary = action(argument)
            _push(config)
    if _is_main():
        print(json.dumps(summary, indent=2))
    process_state().destroy_process_group()


@contextmanager
def one_line_errors(prog: str, before_training: bool = False) -> Iterator[None]:
    """End the command `prog` with one line on standard error and an exit status where `train` raises.

    The status is 2 where settings, data or a checkpoint are not right or not there; 1 where the loss is not finite, or
    a file cannot be read or written, which is 2 too `before_training`; 143 or 130 where SIGTERM or Ctrl-C stopped it.
    """
    try:
        yield
    except Stopped as stopped:
        _exit(f"{prog}: {stopped}; saved, go on with: {resume_command()}", 128 + stopped.signum)
    except KeyboardInterrupt:  # outside of training there is nothing to save
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
