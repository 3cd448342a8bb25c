"""``python -m timm_sugar``: run a script, such as timm's train.py, with our models registered, or run a command."""

import runpy
import sys
from contextlib import nullcontext
from pathlib import Path

from . import cli
from .integrations.timm import monitored

USAGE = "usage: python -m timm_sugar [--monitor] SCRIPT [ARGS], or COMMAND [ARGS] as timm-sugar takes it"


def main(argv: list[str]) -> int:
    """Run a command of timm-sugar, or a script as ``python SCRIPT ...`` would after ``import timm_sugar``.

    With ``--monitor`` before the script, dead units of the network that it trains are added to timm's log.

    Returns:
        The command's status; 0 after a script, or 2 with a message on standard error if the script does not exist.
        Exceptions of the script, SystemExit included, propagate.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] in cli.COMMANDS or argv[0] == "--version":
        return cli.main(argv)
    monitor = argv[0] == "--monitor"
    if monitor and not (argv := argv[1:]):
        print(USAGE, file=sys.stderr)
        return 2
    script = Path(argv[0])
    if not script.is_file():
        print(f"python -m timm_sugar: no such script or command: {script}; {USAGE}", file=sys.stderr)
        return 2
    sys.argv = argv
    sys.path[0] = str(script.resolve().parent)
    with monitored() if monitor else nullcontext():
        runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
