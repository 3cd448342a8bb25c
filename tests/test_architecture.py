"""The structure: imports go one way, and every file begins with what it is for."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "timm_sugar"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(path for name in ("tests", "train", "benchmarks") for path in (ROOT / name).rglob("*.py"))
# A part imports from those before it, and from itself. "timm_sugar" is the package's own file: the public names.
ORDER = [
    "_program", "_timm", "_torch", "files", "terminal", "surrogates", "kernels", "functional", "gradients", "layers",
    "activations", "monitor", "integrations", "transformers", "convert", "init", "models", "timm_sugar",
    "settings", "metrics", "data", "analysis", "hub", "training", "cli", "__main__",
]  # fmt: skip


def parts_imported(tree: ast.AST, module: tuple[str, ...]) -> dict[str, int]:
    """Parts of the package that the code of a module imports, wherever in it, with the line of the first import.

    Args:
        tree: The parsed code.
        module: Its dotted name, where a package's own file ends in ``__init__``.
    """
    found: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*module[: len(module) - node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for top, *rest in names:
            if top == "timm_sugar":
                part = rest[0] if rest and rest[0] in ORDER else "timm_sugar"
                found.setdefault(part, node.lineno)
    return found


def module_name(path: Path) -> tuple[str, ...]:
    return path.relative_to(ROOT).with_suffix("").parts


def part_of(path: Path) -> str:
    name = module_name(path)
    return "timm_sugar" if name == ("timm_sugar", "__init__") else name[1]


def test_every_part_has_a_place_in_the_order():
    assert {part_of(path) for path in SOURCES} == set(ORDER)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    place = ORDER.index(part_of(path))
    imported = parts_imported(ast.parse(path.read_text()), module_name(path))
    against = [f"line {line}: {part}" for part, line in imported.items() if ORDER.index(part) > place]
    assert not against, f"{path.relative_to(ROOT)} imports what comes after it: {against}"


@pytest.mark.parametrize(
    ("code", "module", "parts"),
    [
        ("from .. import files", ("timm_sugar", "hub", "card"), {"files"}),
        ("from ..data.sources import NAMES", ("timm_sugar", "hub", "card"), {"data"}),
        ("from .card import model_card", ("timm_sugar", "hub", "__init__"), {"hub"}),
        ("from . import transformers", ("timm_sugar", "convert"), {"transformers"}),
        ("def f():\n    import timm_sugar.training.train", ("timm_sugar", "layers"), {"training"}),
        ("from timm_sugar import convert, sugar", ("timm_sugar", "cli"), {"convert", "timm_sugar"}),
        ("import timm_sugar, timm", ("timm_sugar", "training", "results"), {"timm_sugar"}),
        ("import os\nfrom transformers import x", ("timm_sugar", "transformers"), set()),
    ],
)
def test_every_form_of_import_is_seen(code, module, parts):
    assert parts_imported(ast.parse(code), module).keys() == parts


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_settings_recipes_and_templates_say_what_they_are_for():
    names = ("*.yml", "*.yaml", ".github/workflows/*.yml", "train/*/*.yaml", "train/launch/*.sh", ".ci/*", "Makefile")
    settings = [path for name in (*names, "pyproject.toml", "CITATION.cff") for path in ROOT.glob(name)]
    assert len(settings) > 20
    for path in settings:
        first, second = path.read_text().splitlines()[:2]
        assert (second if first.startswith("#!") else first).startswith("# "), path
    for path in (*PACKAGE.rglob("*.md"), *PACKAGE.rglob("*.html")):
        assert path.read_text().startswith("{#- "), path


def test_contributing_lists_every_part_and_every_file_of_the_trainer():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    listed = {name for line in text.splitlines() if line.startswith("| `") for name in re.findall("`(.*?)`", line)}
    parts = {path.name + "/" * path.is_dir() for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    missing = {f"timm_sugar/{name}" for name in parts - {"__pycache__/", "__main__.py"}} - listed
    assert not missing
    assert {path.name for path in (PACKAGE / "training").glob("*.py")} - {"__init__.py"} <= listed


def test_the_trainer_is_one_file_that_can_be_read():
    assert len((PACKAGE / "training" / "train.py").read_text().splitlines()) <= 350


def test_no_files_import_each_other():
    """Not even inside of a function or for type checking alone."""
    graph = {path: set(files_imported(path)) for path in SOURCES}

    def reached(path: Path, seen: set[Path]) -> set[Path]:
        for other in graph[path] - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    assert not [path.relative_to(ROOT) for path in SOURCES if path in reached(path, set())]


def files_imported(path: Path) -> Iterator[Path]:
    """The package's files that a file imports from; a package's own file where a name comes from that."""
    module = module_name(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.level or (node.module or "").startswith("timm_sugar")):
            continue
        base = [*module[: len(module) - node.level]] if node.level else []
        base += node.module.split(".") if node.module else []
        for name in [alias.name for alias in node.names]:
            candidates = (Path(*base, name), Path(*base))
            found = (ROOT / c.with_suffix(".py") for c in candidates)
            yield next((file for file in found if file.is_file()), ROOT.joinpath(*base, "__init__.py"))
