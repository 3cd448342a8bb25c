"""Shared code of the benchmarks: allocator environments, tables and JSON files."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
import torch

import timm_sugar
from timm_sugar.files import write_file

# By default glibc returns every large block to the kernel, and page faults hide the cost of the computation.
ALLOCATORS = {
    "default": {},
    "retained": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000", "MALLOC_TOP_PAD_": "67108864"},
}


def run_self(arguments: list[str], allocator: str) -> None:
    """Run the calling script again in a new process with one of `ALLOCATORS`."""
    subprocess.run([sys.executable, *arguments], check=True, env={**os.environ, **ALLOCATORS[allocator]})


def environment() -> dict[str, Any]:
    """Return the versions and the machine of a measurement: processor, vector instructions, compiler, GPU."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    found = shutil.which(os.environ.get("CXX", "g++"))
    compiler = subprocess.run([found, "--version"], capture_output=True, text=True).stdout if found else "none"
    machine = {"cpu": cpu, "vector": torch.backends.cpu.get_cpu_capability(), "compiler": compiler.partition("\n")[0]}
    machine |= {"kernel_flags": os.environ.get("TIMM_SUGAR_CXXFLAGS", "-march=native")}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "timm": timm.__version__, "timm_sugar": timm_sugar.__version__}
    return {**versions, "python": platform.python_version(), **machine, "threads": torch.get_num_threads()}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows with common keys as an aligned Markdown table."""
    header = list(rows[0])
    cells = [header, *([_format(row[key]) for key in header] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for number, row in enumerate(cells):
        print("| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(content, indent=1) + "\n")


def _format(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
