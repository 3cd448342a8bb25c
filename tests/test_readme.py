"""The README and the guide: every Python snippet runs, every command line of ours parses, every local link leads on."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from timm_sugar import cli, surrogates
from timm_sugar.training import TrainConfig, train
from timm_sugar.training.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A folder in which output/mine is a finished run, as the README's own commands leave it."""
    folder = tmp_path_factory.mktemp("readme")
    train(
        TrainConfig(
            data="digits", model="resnet18_sugar_bsilu", model_args={"channels": [8, 8, 8, 8]}, img_size=16, epochs=1,
            limit_train=40, limit_val=20, batch_size=20, output=str(folder / "output" / "mine"),
        )
    )  # fmt: skip
    return folder


@pytest.mark.filterwarnings("ignore:the conversion is not part of what a saved model records")
@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page, "python")], ids=lambda page: page.name)
def test_snippets_run(page, finished_run, monkeypatch):
    monkeypatch.chdir(finished_run)
    monkeypatch.setenv("TIMM_SUGAR_HUB", str(ROOT / "hub_cards"))
    monkeypatch.setattr(surrogates, "_SURROGATES", dict(surrogates._SURROGATES))
    namespace = {"torch": torch, "x": torch.randn(3, 4)}
    for block in _blocks(page, "python"):
        exec(compile(block, f"{page.name}: {block[:40]!r}", "exec"), namespace)


def _command_lines() -> list[str]:
    found = {
        line.split("   #")[0].strip()
        for page in PAGES
        for block in _blocks(page, "console")
        for line in block.splitlines()
    }
    return sorted(
        line for line in found if any(part in line for part in ("timm-sugar ", " train/", "timm_sugar.training "))
    )


@pytest.mark.parametrize("line", _command_lines())
def test_command_lines_parse(line):
    words = shlex.split(line)
    if "timm-sugar" in words:
        load_config(cli._parse(words[words.index("timm-sugar") + 1 :]).others, "prog", "text", "compare")
        return
    if "timm_sugar.training" in words:
        load_config(words[words.index("timm_sugar.training") + 1 :], "prog", "text", "digits")
        return
    script = next(i for i, word in enumerate(words) if word.startswith("train/"))
    assert (ROOT / words[script]).exists()
    if "TrainConfig" in (ROOT / words[script]).read_text() or "main(__file__" in (ROOT / words[script]).read_text():
        recipe = re.search(r'recipe="(\w+)"', (ROOT / words[script]).read_text())[1]
        load_config(words[script + 1 :], "prog", "text", recipe)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_local_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
