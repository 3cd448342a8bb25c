"""Every benchmark starts: its imports hold, and its help and errors come before any measurement."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")


@pytest.fixture
def script(request, monkeypatch):
    if request.param == "convert_reach":  # which is about transformers, among others
        pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location(request.param, FOLDER / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("common", None)


@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
@pytest.mark.parametrize(("flag", "status", "says"), [("--help", 0, "options:"), ("--no-such-flag", 2, "unrecognized")])
def test_benchmark_starts(script, flag, status, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.__name__, flag])
    with pytest.raises(SystemExit) as exit:
        script.main()
    assert exit.value.code == status
    out, err = capsys.readouterr()
    assert says in out + err
