"""Seconds until the images of a run are ready. Run ``python benchmarks/start.py --data cifar10 [--img-size 32]``.

Each start is a new process: "cold" with an empty cache of decoded images, "warm" with the cache of the previous start.
The time is from opening the data to splits, pixels, mean and standard deviation, without imports; the files are in the
page cache, which is not dropped. Prints a Markdown table of the fastest start of each kind, and of all of them.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time

from common import environment

from timm_sugar.data import available_cpus
from timm_sugar.settings import TrainConfig
from timm_sugar.training.images import load_images, open_source
from timm_sugar.training.processes import process_state


def measure(data: str, img_size: int) -> dict[str, float]:
    """Return wall time and CPU time in seconds, including the decoding processes."""
    config = TrainConfig(data=data, img_size=img_size)
    process_state()
    cpu, began = _cpu_seconds(), time.perf_counter()
    load_images(config, open_source(config), 0, 1)
    return dict(seconds=time.perf_counter() - began, cpu_seconds=_cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3, help="number of cold and warm starts")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(measure(args.data, args.img_size)))
        return
    command = [sys.executable, __file__, "--once", "--data", args.data, "--img-size", str(args.img_size)]
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(args.repeat):
        with tempfile.TemporaryDirectory() as cache:
            for kind, starts in found.items():
                shown = subprocess.run(
                    command, env=os.environ | {"TIMM_SUGAR_CACHE": cache}, capture_output=True, text=True, check=True
                )
                starts.append(json.loads(shown.stdout.splitlines()[-1]))
                print(kind, starts[-1], file=sys.stderr, flush=True)
    print(f"{environment()['cpu']}, {available_cpus()} cores, Python {platform.python_version()}\n")
    print("| start | fastest, s | all, s | processor time of the fastest, s |\n| --- | --- | --- | --- |")
    for kind, starts in found.items():
        best = min(starts, key=lambda start: start["seconds"])
        every = ", ".join(f"{start['seconds']:.1f}" for start in starts)
        print(f"| {kind} | {best['seconds']:.1f} | {every} | {best['cpu_seconds']:.1f} |")


if __name__ == "__main__":
    main()
