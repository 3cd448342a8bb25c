"""Appendix A: the batched network against autograd and plain training, categories, theory's bound, the script."""

import importlib.util
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import paper
from paper import dying_relu
from paper.collapse import PAPER, born_dead_bound, categorise, chance, relative_ranges, table_row, wilson_interval
from paper.dying_relu import BatchedNetwork, Cell, run_cells, train, train_alone
from timm_sugar import list_surrogates, register_surrogate, sugar, surrogates

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs" / "dying-relu"


@pytest.mark.parametrize("surrogate", [None, *list_surrogates()])
def test_gradients_are_those_of_autograd_through_the_library(surrogate):
    torch.manual_seed(0)
    sizes, runs = [2, 3, 3, 2], 5
    network = BatchedNetwork(sizes, runs, surrogate, torch.float64)
    network.flat.normal_()
    x, y = torch.randn(2, runs, 32, dtype=torch.float64), torch.randn(2, runs, 32, dtype=torch.float64)
    inputs, z = network.forward(x)
    network.backward(inputs, z, 2 * (z[-1] - y) / y[:, 0].numel())

    layers = [w.clone().requires_grad_() for w in network.layers]
    h = x
    for i, w in enumerate(layers):
        h = torch.einsum("oir,irs->ors", w[:, :-1], h) + w[:, -1, :, None]
        if i < len(layers) - 1:
            h = torch.relu(h) if surrogate is None else sugar(h, surrogate)
    torch.testing.assert_close(z[-1], h)
    ((h - y) ** 2).mean((0, 2)).sum().backward()
    gradients = network.flat.grad.split(
        [w.numel() for w in layers] + [network.flat.numel() - sum(map(torch.numel, layers))]
    )
    for w, gradient in zip(layers, gradients, strict=False):
        torch.testing.assert_close(gradient.view_as(w), w.grad)


@pytest.mark.parametrize(
    "cell",
    [
        Cell("f1", "sugar_bsilu", depth=3),
        Cell("f2", "he", depth=2, width=3),
        Cell("f4", "rai_sugar_gelu", depth=4, width=4),
        Cell("f4_abs", "rai", depth=5),
    ],
    ids=lambda cell: cell.method,
)
def test_a_run_does_not_depend_on_how_many_run_beside_it(cell):
    few, more = (train(replace(cell, runs=runs, epochs=2)) for runs in (3, 7))
    assert more["loss"][:3] == few["loss"]  # to the last bit
    assert more["variance"][:3] == few["variance"]
    assert [epoch[:3] for epoch in more["activation"]] == few["activation"]
    assert more["born_dead"][:3] == few["born_dead"]
    assert more["dead"][:3] == few["dead"]
    assert len(set(more["loss"])) == 7  # and the runs differ


@pytest.mark.parametrize("method", ["he", "rai", "sugar_bsilu", "rai_sugar_nelu"])
def test_batched_training_is_plain_training(method):
    cell = Cell("f1", method, depth=2, width=4, runs=4, epochs=3)
    alone = [train_alone(cell, run) for run in range(cell.runs)]
    assert train(cell)["loss"] == pytest.approx(alone, rel=2e-3)


def test_methods_share_data_weights_and_shuffles():
    he, with_sugar = (train(Cell("f2", m, runs=4, epochs=0)) for m in ("he", "sugar_bsilu"))
    assert he["loss"] == with_sugar["loss"]
    assert he["born_dead"] == with_sugar["born_dead"]


def test_training_leaves_global_state_alone():
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    train(Cell("f1", "rai", runs=2, epochs=1))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


def test_dead_relu_networks_stay_dead_and_predict_the_mean_but_sugar_revives_some():
    he, with_sugar = (train(Cell("f1", m, runs=30, epochs=25)) for m in ("he", "sugar_bsilu"))
    assert sum(he["born_dead"]) > 20
    assert all(after for before, after in zip(he["born_dead"], he["dead"], strict=True) if before)
    assert sum(with_sugar["dead"]) < sum(he["dead"]) / 2
    for dead, loss, variance in zip(he["dead"], he["loss"], he["variance"], strict=True):
        if dead:
            assert categorise("f1", loss / variance) == "A"


def test_activation_counts_positive_pre_activations():
    cell = Cell("f1", "rai", depth=3, runs=4, epochs=0)
    network = dying_relu.plain_network(cell)
    expected = []
    for run in range(cell.runs):
        dying_relu.initialise(network, cell, run)
        h, active = dying_relu.samples(cell, run)[:, :512].T, []
        for layer in network:
            h = layer(h)
            if isinstance(layer, torch.nn.Linear) and layer is not network[-1]:
                active.append((h > 0).double().mean())
        expected.append(torch.stack(active).mean().item())
    assert train(cell)["activation"] == [pytest.approx(expected)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"function": "f5"}, "unknown function 'f5'"),
        ({"method": "hee"}, "unknown method 'hee'; did you mean 'he'"),
        ({"method": "xx_sugar_bsilu"}, "unknown method"),
        ({"method": "sugar_bsilo"}, "unknown surrogate 'bsilo'; did you mean 'bsilu'"),
        ({"runs": 0}, "runs must be a whole number of at least 1, got 0"),
        ({"depth": 2.5}, "depth must be"),
        ({"epochs": -1}, "epochs must be"),
    ],
)
def test_bad_cells(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Cell(**{"function": "f1", "method": "he", **changes})


def test_cells_are_kept_and_not_run_again(tmp_path, monkeypatch):
    cells = [Cell("f1", m, depth=2, runs=2, epochs=1) for m in ("he", "sugar_bsilu")]
    first = dict(run_cells(cells, tmp_path))
    monkeypatch.setattr(dying_relu, "train", lambda cell: pytest.fail(f"{cell} ran again"))
    assert {cell: r["loss"] for cell, r in run_cells(cells, tmp_path)} == {c: r["loss"] for c, r in first.items()}
    monkeypatch.undo()
    longer = replace(cells[0], epochs=2)  # the same file, other settings
    assert dict(run_cells([longer], tmp_path))[longer]["loss"] != first[cells[0]]["loss"]
    (tmp_path / "f1-he-2x2.json").write_text('{"function": "f1"')  # broken
    assert dict(run_cells([longer], tmp_path))[longer]["epochs"] == 2


def test_processes_give_the_same_results(tmp_path):
    cells = [Cell("f1", m, depth=2, runs=2, epochs=1) for m in ("he", "rai", "sugar_bsilu")]
    here, there = dict(run_cells(cells, tmp_path / "a")), dict(run_cells(cells, tmp_path / "b", jobs=2))
    assert {c: r["loss"] for c, r in here.items()} == {c: r["loss"] for c, r in there.items()}


def test_wilson_interval_against_published_values():
    # Newcombe 1998, Statistics in Medicine 17, table I
    for successes, runs, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson_interval(successes, runs) == pytest.approx([100 * low, 100 * high], abs=0.055)
    assert wilson_interval(20, 20)[1] == 100


def test_figures_are_compared_over_both_samples():
    # 15 of 100 beside 188 of 1000, and beside 188 of 1000 as if the paper had 1000 runs too
    assert chance(188, 1000, 15.0, 100) == 0.418
    assert chance(188, 1000, 15.0, 1000) < 0.05
    assert chance(3, 6, 50.0, 6) == 1
    assert chance(3, 4, 25.0, 4) == 0.486  # Fisher's lady tasting tea, two-sided: 34 of 70


def test_categories_put_table_3_where_it_belongs():
    for function in ("f1", "f2", "f3", "f4", "f4_abs"):
        for category, (low, high) in relative_ranges(function).items():
            assert categorise(function, low) == categorise(function, high) == category
    assert categorise("f2", math.nan) == "A"
    assert relative_ranges("f4")["D"][0] == pytest.approx(0.357, abs=1e-3)


def test_theorys_bound_holds_and_is_close():
    assert born_dead_bound(1, 2) == 0
    assert born_dead_bound(2, 1) == pytest.approx(0.5)  # a single unit has one live ray, which dies every other time
    assert born_dead_bound(200, 2) == pytest.approx(1)
    torch.manual_seed(0)
    networks = 200_000
    for width, gap in ((2, 0.03), (3, 0.07)):
        h = torch.tensor([1.0, -1.0]).expand(networks, 1, 2)
        for depth in range(1, 11):
            h = torch.relu(torch.randn(networks, width, h.shape[1]) @ h)
            dead = (h == 0).all(2).all(1).double().mean().item()
            assert dead >= born_dead_bound(depth, width) - 4 * math.sqrt(0.25 / networks)
            assert dead - born_dead_bound(depth, width) < gap


def test_row_of_the_table():
    result = {
        "loss": [1.0, 0.99, 0.68, 0.3, 0.02, 0.01, 0.0, 0.0, 0.0, 0.0],
        "variance": [1.0] * 10,
        "born_dead": [True] * 9 + [False],
        "dead": [True] * 2 + [False] * 8,
    }
    row = table_row(Cell("f1", "sugar_bsilu", runs=10), result)
    assert {c: row[c] for c in "ABCD"} == {"A": 20.0, "B": 10.0, "C": 70.0, "D": None}
    assert row["paper"] == PAPER["f1", "sugar_bsilu"]
    assert row["paper_p"] == {
        c: chance(n, 10, PAPER["f1", "sugar_bsilu"][c], 100) for c, n in zip("ABC", (2, 1, 7), strict=True)
    }
    assert row["interval"]["A"] == [5.7, 51.0]
    assert row["outside_table3"] == 10.0  # 0.3 lies between (C) and (B)
    assert (row["born_dead"], row["dead"]) == (90.0, 20.0)
    assert table_row(Cell("f1", "sugar_bsilu", depth=5, runs=10), result)["paper"] is None


@pytest.mark.slow
def test_sugar_saves_most_runs_of_the_papers_first_cell():
    rows = {}
    for method in ("he", "rai", "sugar_bsilu"):
        cell = Cell("f1", method, runs=40, epochs=30)
        rows[method] = table_row(cell, train(cell))
    assert rows["he"]["A"] >= 85
    assert rows["sugar_bsilu"]["A"] <= 35
    assert rows["sugar_bsilu"]["A"] < rows["rai"]["A"] < rows["he"]["A"]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dying_relu_script", ROOT / "train" / "dying_relu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch):
    """The script, called with command-line arguments in this process."""
    module = load_script()

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["dying_relu.py", *arguments])
        module.main()

    return call


def test_script_writes_the_table_and_the_pictures(tmp_path, script, capfd):
    options = ("--runs", "4", "--epochs", "1", "--depth", "3", "2", "--jobs", "1", "--output", str(tmp_path))
    script(*options, "--surrogate", "nelu")
    out, err = capfd.readouterr()
    assert err == ""  # the progress bar is for terminals
    assert "sugar_nelu" in out
    rows = json.loads((tmp_path / "table2.json").read_text())
    assert {row["method"] for row in rows} == {"he", "rai", "sugar_nelu", "rai_sugar_nelu"}
    shapes = {(row["function"], row["method"], row["depth"], row["width"]) for row in rows if row["paper"]}
    assert shapes == {(f, m, 20, 4) for f in ("f4", "f4_abs") for m in ("he", "rai")}
    assert [row["depth"] for row in rows if row["function"] == "f1"] == [3, 2] * 4
    names = {path.name for path in tmp_path.iterdir()}
    for figure in ("figure1_gradients", "figure1_gradients_dark", "figure7_activation", "figure8_surrogates", "losses"):
        assert {f"{figure}.png", f"{figure}.pdf"} <= names
    assert not [name for name in names if name.startswith(".")]


def test_script_leaves_methods_out(tmp_path, script):
    options = ("--runs", "2", "--epochs", "0", "--depth", "2", "--jobs", "1", "--output", str(tmp_path))
    script(*options, "--methods", "he", "sugar", "--sweep")
    for name in ("table2", "depth"):
        assert {row["method"] for row in json.loads((tmp_path / f"{name}.json").read_text())} == {"he", "sugar_bsilu"}


def test_script_adds_every_surrogate_and_the_sweep(tmp_path, script, capsys):
    options = ("--runs", "2", "--epochs", "0", "--depth", "2", "--jobs", "1", "--output", str(tmp_path))
    register_surrogate("dying_relu_test", lambda x, alpha: torch.sigmoid(x))
    try:
        script(*options, "--surrogate", "all", "--sweep")
    finally:
        surrogates._SURROGATES.pop("dying_relu_test")
    rows = json.loads((tmp_path / "table2.json").read_text())
    methods = {row["method"] for row in rows}
    assert methods == {"he", "rai", "rai_sugar_bsilu", *(f"sugar_{s}" for s in [*list_surrogates(), "dying_relu_test"])}
    depths = [row["depth"] for row in json.loads((tmp_path / "depth.json").read_text()) if row["method"] == "rai"]
    assert depths[0] == 2
    assert depths[-1] == 40
    assert (tmp_path / "depth.png").exists()
    assert capsys.readouterr().out.count("sugar_dying_relu_test") == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--runs", "0"), "runs must be a whole number of at least 1, got 0"),
        (("--runs", "ten"), "invalid int value: 'ten'"),
        (("--surrogate", "bsilo"), "unknown surrogate 'bsilo'; did you mean 'bsilu'?"),
        (("--jobs", "0"), "--jobs must be at least 1, got 0"),
        (("--methods", "rai", "sugar"), "--methods must hold he and sugar, which the pictures compare, got rai sugar"),
    ],
)
def test_script_refuses_bad_input_in_one_line(tmp_path, script, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        script(*arguments, "--output", str(tmp_path / "none"))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_script_help_has_an_example(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script("--help")
    assert stop.value.code == 0
    assert "python train/dying_relu.py --surrogate all --sweep" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("package", "extra", "users"),
    [
        ("rich", "train", ()),
        ("scipy", "train", ("paper.collapse",)),
        ("matplotlib", "report", ("paper.figures", "timm_sugar.analysis.plots")),
    ],
)
def test_script_names_the_missing_extra(monkeypatch, package, extra, users):
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith(f"{package}.") or name in users]:
        monkeypatch.delitem(sys.modules, name)
    if "paper.figures" in users:
        monkeypatch.delattr(paper, "figures", raising=False)
    with pytest.raises(SystemExit, match=re.escape(f"{package} is missing: pip install 'timm-sugar[{extra}]'")):
        load_script()


def test_document_quotes_the_committed_table():
    """Every number in the tables of docs/dying-relu.md, and every percentage of its prose, is a committed one."""
    module = load_script()
    document = (ROOT / "docs" / "dying-relu.md").read_text()
    table, depth = (json.loads((COMMITTED / name).read_text()) for name in ("table2.json", "depth.json"))
    cells = [re.split(r" *\| *", line.strip("| ")) for line in document.splitlines() if line.startswith("| ")]
    tables = [cell for cell in cells if not cell[0].startswith("---")]

    for row in table:
        expected = [row["function"], row["method"], f"{row['depth']}x{row['width']}"]
        quoted = [module.quoted(row, category) for category in "ABCD"]
        assert sum(cell[:3] == expected for cell in tables) == 1, expected
        assert [*expected, *quoted] in [cell + [""] * (7 - len(cell)) for cell in tables]
    by_depth = {(row["depth"], row["method"]): row for row in depth}
    for layers in {row["depth"] for row in depth}:
        shares = [module.quoted(by_depth[layers, m], "A").split(" (")[0] for m in ("he", "rai", "sugar_bsilu")]
        assert [str(layers), f"{100 * born_dead_bound(layers, 2):.1f}", *shares] in tables

    prose = "\n".join(line for line in document.splitlines() if not line.startswith("|"))
    of = {(r["function"], r["method"], r["depth"]): r for r in table}
    committed = {f"{v:g}" for r in [*table, *depth] for c in "ABCD" if (v := r[c]) is not None}
    committed |= {f"{v:g}" for r in table for v in (r["born_dead"], r["dead"], *(r["paper"] or {}).values())}
    for number in re.findall(r"(\d+(?:\.\d+)?)%", prose):
        assert number in committed | {"95"}, f"{number}% is in no committed file"
    for function in ("f1", "f2", "f3", "f4", "f4_abs"):
        for method in ("he", "sugar_bsilu"):
            assert f"`{function}` {of[function, method, 10]['A']:g}%" in prose
    for function in ("f4", "f4_abs"):
        assert f"{of[function, 'sugar_bsilu', 10]['lowest_loss']:.4f}" in prose
