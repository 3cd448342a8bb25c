"""The wheel and the sdist: what is in them, and that the wheel works with the core dependencies alone."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import timm_sugar
from timm_sugar.hub import write_model_folder
from timm_sugar.models import build

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize(("in_ci", "status"), [("", 0), ("true", 1)])
def test_timms_own_tests_are_not_left_out_in_silence(in_ci, status):
    without_index = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")} | {"PIP_NO_INDEX": "1"}
    done = run(ROOT / ".ci/timm-test", sys.executable, env=without_index | {"CI": in_ci})
    assert done.returncode == status
    assert re.fullmatch(r"timm's own tests were not run: pip cannot fetch the source of timm [\d.]+\n", done.stderr)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with both, built without network: the wheel from the sdist, as a package index would get it."""
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (path,) = built.glob("*.whl")
    return path


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    library = (path for path in (ROOT / "timm_sugar").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    info = f"timm_sugar-{timm_sugar.__version__}.dist-info"
    added = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    recipes = {f"timm_sugar/recipes/{path.name}" for path in (ROOT / "train/recipes").glob("*.yaml")}
    assert len(recipes) > 8
    assert names == {path.relative_to(ROOT).as_posix() for path in library} | recipes | added
    assert wheel.stat().st_size < 300_000


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an unpacked sdist does not say what the repository holds")
def test_the_sdist_holds_the_repository_but_no_weights(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    left_out = set(run("git", "ls-files", cwd=ROOT).stdout.split()) - names
    assert not [name for name in left_out if not name.startswith("hub_cards/")]
    assert not [name for name in names if name.endswith((".safetensors", ".pt", ".pth", ".pyc", ".parquet"))]
    assert path.stat().st_size < 2_000_000


def test_the_oldest_versions_are_those_that_the_package_claims():
    oldest = dict(line.split("==") for line in (ROOT / ".ci/oldest.txt").read_text().split() if "==" in line)
    project = (ROOT / "pyproject.toml").read_text().partition("\ndocs = ")[0]  # the core, train and report
    claimed = dict(re.findall('"([a-z0-9-]+)>=([0-9.]+)"', project))
    assert len(claimed) == 12
    for name, version in claimed.items():
        assert Version(oldest[name]) == Version(version), name


def test_the_installed_wheel_trains_by_a_recipe(wheel, tmp_path):
    done = run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path / "lib", wheel)
    assert done.returncode == 0, done.stderr
    flags = "--data digits --img-size 32 --batch-size 16 --limit-train 64 --workers 0 --mixed-precision no --dry-run"
    network = ["embed_dim=12", "depths=[1, 1, 1, 1]", "num_heads=[1, 2, 2, 4]"]
    command = ["-m", "timm_sugar.training", "--recipe", "swin_tiny_tinyimagenet", *flags.split()]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "lib"), "CUDA_VISIBLE_DEVICES": ""}
    done = run(sys.executable, *command, "--model-args", *network, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert (json.loads(done.stdout)["epochs"], json.loads(done.stdout)["steps_per_epoch"]) == (300, 4)


@pytest.fixture(scope="module")
def core(wheel, tmp_path_factory) -> list[Path]:
    """Folders for sys.path: the installed wheel, and links to what its core dependencies need, and no other package."""
    folder = tmp_path_factory.mktemp("core")
    target = folder / "installed"
    done = run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel)
    assert done.returncode == 0, done.stderr
    metadata = Parser().parsestr(next(target.glob("*.dist-info/METADATA")).read_text())
    links = folder / "dependencies"
    links.mkdir()
    wanted, seen = [*metadata.get_all("Requires-Dist")], set()
    while wanted:
        requirement = Requirement(wanted.pop())
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)
        ):
            continue
        distribution = importlib.metadata.distribution(requirement.name)
        key = (distribution.name, *sorted(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        wanted += distribution.requires or []
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (links / top).exists():
                (links / top).symlink_to(distribution.locate_file(top))
    return [target, links]


CODE = """
from importlib.util import find_spec
for name in ("accelerate", "datasets", "sklearn", "rich", "matplotlib", "transformers"):
    assert find_spec(name) is None, name
import torch, timm, timm_sugar
assert timm_sugar.__file__.startswith(sys.path[-2])
from timm_sugar.kernels import gradient_path
for save in ("exact", "uint8"):
    model = timm_sugar.create_model("resnet18_cifar_sugar_bsilu", num_classes=3, save=save)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
assert [gradient_path("bsilu", save) for save in ("exact", "uint8")] == ["cpp", "cpp"]
assert timm.create_model("swin_tiny_sugar_nelu", device="meta").num_classes == 1000
from timm_sugar.cli import main
assert main(["models"]) == 0
for command in ("verify", "profile", "landscape"):
    assert main([command, RUN, "--data", "digits"]) == 1
assert main(["report", RUN]) == 1
publish = ["publish", RUN, "--repo-id", "lab/net"]
assert main([*publish, "--dry-run"]) == 0
assert main([*publish, "--to-folder", HUB]) == 0
assert "hf-hub:lab/net" in open(f"{HUB}/README.md").read()
assert timm.create_model(f"local-dir:{HUB}", pretrained=True).num_classes == 2
sys.argv = ["timm-sugar", "--version"]
import runpy
runpy.run_path(SCRIPT, run_name="__main__")
"""


def test_core_dependencies_suffice_and_a_command_names_the_extra_that_it_needs(core, tmp_path):
    network = build("resnet18_sugar_bsilu", num_classes=2, channels=[8, 8, 8, 8])
    facts = dict(data="digits", test_top1=0.5, parameters=1, train_images=1, epochs=1, best_epoch=1, seed=1)
    data_config = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)
    run_folder, hub, script = (str(path) for path in (tmp_path / "run", tmp_path / "hub", core[0] / "bin/timm-sugar"))
    settings = {"data": "digits", "split_seed": 0}
    write_model_folder(
        tmp_path / "run/model", network, "resnet18_sugar_bsilu", "ab", data_config, facts | dict(settings={})
    )
    (tmp_path / "run/summary.json").write_text(json.dumps(facts))
    (tmp_path / "run/config.yaml").write_text(json.dumps(settings))
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps(dict(epoch=1, train_loss=1.0, val_top1=None)) + "\n")
    start = f"import sys; sys.path += {[*map(str, core)]!r}; RUN, HUB, SCRIPT = {run_folder!r}, {hub!r}, {script!r}\n"
    done = run(sys.executable, "-I", "-S", "-c", start + CODE, env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resnet18_sugar_bsilu" in done.stdout
    assert done.stdout.endswith(f"timm-sugar {timm_sugar.__version__}\n")
    error = r"timm-sugar (\w+): error: .* pip install 'timm-sugar\[(\w+)\]'"
    needed = [re.fullmatch(error, line).groups() for line in done.stderr.splitlines()]
    assert needed == [("verify", "train"), *((name, "report") for name in ("profile", "landscape", "report"))]
