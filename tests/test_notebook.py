"""docs/tour.ipynb runs from top to bottom and says what it says in the repository, where its outputs are small."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def outputs(notebook) -> str:
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return "\n".join(output.get("text", "") for cell in cells for output in cell.outputs)


def test_its_outputs_are_small_and_hold_what_it_promises():
    nbformat = pytest.importorskip("nbformat")
    assert NOTEBOOK.stat().st_size < 40_000
    text = outputs(nbformat.read(NOTEBOOK, as_version=4))
    assert "same output: True" in text
    assert "same logits: True" in text
    assert "ReLU without timm_sugar: True" in text
    assert not re.search(r"Traceback|Warning|/home/|/root/|/tmp/", text)


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    kernel = tmp_path / "jupyter" / "kernels" / "tour"
    kernel.mkdir(parents=True)  # this environment, whatever kernels the machine has
    argv = f'["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"]'
    (kernel / "kernel.json").write_text(f'{{"argv": {argv}, "display_name": "tour", "language": "python"}}')
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = outputs(notebook)
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="tour", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    text = outputs(notebook)
    accuracies = [float(value) for value in re.findall(r"test accuracy ([\d.]+)%", text)]
    relu, sugar, converted, trained = accuracies
    assert max(sugar, converted) > relu + 20, text  # which of them depends on the processor's rounding
    assert trained > 50
    lines = ("same output: True", "same logits: True", "ReLU without timm_sugar: True")
    for line in (*lines, "paired t-test over n = 2 seeds, on 359 test images"):
        assert line in text
        assert line in stored
