"""A comparison: its grid, what is chosen and shown of hand-made runs, and real runs, stopped and gone on with."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import ttest_rel

import timm_sugar
from timm_sugar.analysis.comparison import paired, remarks, result_tables
from timm_sugar.cli import main
from timm_sugar.files import read_mapping, to_yaml
from timm_sugar.hub import find_model
from timm_sugar.layers import Activation
from timm_sugar.training import compare
from timm_sugar.training.cells import Cell
from timm_sugar.training.compare import Comparison, plan, table

SMALL = ["--img-size", "16", "--batch-size", "16", "--epochs", "1", "--model-args", "channels=[8,8,8,8]"]
COLOURS = {"blue": (60, 60, 200), "green": (60, 200, 60), "red": (200, 60, 60)}


SUMMARY = dict(test_images=15, test_class_top1=dict(blue=0.25, green=None, red=0.5))


def draw(folder: Path, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    for split, count in (("train", 12), ("test", 5)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(colour) + generator.integers(-80, 80, (16, 16, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("images"))


@pytest.fixture
def planned(images, tmp_path):
    """Return a comparison in a folder."""

    def build(**grid) -> Comparison:
        return plan(tmp_path / "compare", ["--data", str(images), *SMALL], **grid)

    return build


def finish(cell: Cell, val: float, test: float, dead: float = 0.0, **settings) -> None:
    """Write a finished run by hand."""
    folder = cell.config.folder
    (folder / "model").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(dataclasses.asdict(cell.config) | {"processes": 1} | settings))
    (folder / "summary.json").write_text(json.dumps(dict(val_top1=val, test_top1=test, dead_units=dead) | SUMMARY))
    (folder / "model/config.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, folder / "model/model.safetensors")


def diverge(cell: Cell) -> None:
    cell.config.folder.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{cell.config.folder}.log").write_text("x\ntrain: error: the loss is not finite at step 3 (epoch 1)\n")


TESTS = {"relu": [0.80, 0.82, 0.84], "sugar_bsilu": [0.83, 0.84, 0.88], "sugar_nelu": [0.80, 0.83, 0.82]}


def finish_all(comparison: Comparison, tests: dict[str, list[float]] = TESTS) -> None:
    """Finish every run; the second rate is better on the test images, and worse on the validation images."""
    for (name, rate, seed), cell in comparison.cells.items():
        best = rate == comparison.rates[0]
        finish(cell, 0.9 if best else 0.7, tests[name][seed] if best else 0.99, 0.1 * seed)


def test_rates_are_chosen_on_validation_images_and_compared_by_seed_on_test_images(planned, tmp_path):
    comparison = planned(rates=[0.01, 0.1])
    assert list(comparison.cells)[:4] == [
        ("relu", 0.01, 0), ("sugar_bsilu", 0.01, 0), ("sugar_nelu", 0.01, 0), ("relu", 0.1, 0),
    ]  # fmt: skip
    finish_all(comparison)
    found = table(comparison)
    assert (found["done"], found["runs"], found["seeds"], found["test_images"]) == (18, 18, [0, 1, 2], 15)
    relu, bsilu, nelu = found["rows"]
    assert [row["rate"] for row in found["rows"]] == [0.01] * 3
    assert [row["edge"] for row in found["rows"]] == ["lowest"] * 3
    assert relu["test_top1"] == pytest.approx(0.82)
    assert relu["test_interval"] == pytest.approx(4.302653 * 0.02 / 3**0.5, abs=1e-6)
    assert relu["dead_units"] == pytest.approx(0.1)
    assert relu["class_top1"] == [0.25, None, 0.5]
    assert "difference" not in relu
    assert bsilu["differences"] == pytest.approx([0.03, 0.02, 0.04])
    for row, name in ((bsilu, "sugar_bsilu"), (nelu, "sugar_nelu")):
        expected = ttest_rel(TESTS[name], TESTS["relu"])
        low, high = expected.confidence_interval(0.95)
        assert (row["low"], row["high"], row["p"]) == pytest.approx((low, high, expected.pvalue))
    assert bsilu["low"] > 0  # alone it would do
    assert found["verdict"] == (
        "no difference shown between sugar_bsilu and relu "
        "(+3.00 [+0.52, +5.48] points; it leaves out 0, but is one of 2); "
        "no difference shown between sugar_nelu and relu "
        "(-0.33 [-4.13, +3.46] points): paired t-test over n = 3 seeds, 2 comparisons taken together (Bonferroni), "
        "on 15 test images."
    )
    (title, _, lines), (_, heads, classes) = result_tables(found)
    assert title == "mean of 3 seeds, with 95% t-intervals; differences are paired by seed"
    assert lines[0] == ["relu", "0.01", "90.00", "82.00 ± 4.97", "-", "-", "10.00"]
    assert lines[1] == ["sugar_bsilu", "0.01", "90.00", "85.00 ± 6.57", "+3.00 [+0.52, +5.48]", "0.035", "10.00"]
    assert heads == ["class", "relu", "sugar_bsilu", "sugar_nelu"]
    assert classes == [["blue", "25.0", "25.0", "25.0"], ["green", "-", "-", "-"], ["red", "50.0", "50.0", "50.0"]]
    assert remarks(found)[0] == "relu is best at the lowest rate: try lower ones too, with --lrs"
    assert remarks(found)[3:] == [found["verdict"]]
    assert read_mapping(comparison.folder / "compare.json") == found
    assert relu["runs"] == ["seed0/relu-lr0.01", "seed1/relu-lr0.01", "seed2/relu-lr0.01"]
    page = tmp_path / "report.html"
    assert main(["report", str(comparison.folder), "--output", str(page)]) == 0
    text = page.read_text()
    for shown in ("+3.00 [+0.52, +5.48]", "no difference shown between sugar_nelu", "test accuracy by class (%)"):
        assert shown in text
    assert "seed1/sugar_nelu-lr0.01" in text
    assert "lr0.1" not in text.replace("lr0.01", "")  # the rate that was not chosen


@pytest.mark.parametrize(
    ("tests", "words"),
    [
        (
            [0.83, 0.84, 0.88],
            "sugar_bsilu is better than relu here (+3.00 [+0.52, +5.48] points): paired t-test over n",
        ),
        (
            [0.77, 0.80, 0.80],
            "sugar_bsilu is worse than relu here (-3.00 [-5.48, -0.52] points): paired t-test over n",
        ),
        ([0.81, 0.83, 0.85], "(+1.00 [+1.00, +1.00] points; each seed has the same, so that nothing tells the spread)"),
        ([0.80, 0.82, 0.84], "no difference shown between sugar_bsilu and relu (+0.00"),
    ],
)
def test_verdicts_about_one_surrogate(tests, words, planned):
    comparison = planned(rates=[0.01], surrogates=["bsilu"])
    finish_all(comparison, TESTS | {"sugar_bsilu": [round(value, 6) for value in tests]})
    found = table(comparison)
    assert words in found["verdict"]
    assert "Bonferroni" not in found["verdict"]
    assert [row["edge"] for row in found["rows"]] == [None, None]


def test_equal_differences_tell_no_spread():
    found = paired([0.5, 0.5])
    assert (found["difference"], found["low"], found["high"], found["p"]) == (0.5, 0.5, 0.5, None)
    assert paired([0.5])["low"] is None


def test_one_seed_shows_nothing(planned):
    comparison = planned(rates=[0.01], seeds=1)
    finish_all(comparison)
    found = table(comparison)
    assert found["rows"][1]["difference"] == pytest.approx(0.03)
    assert found["verdict"].startswith("no difference shown between sugar_bsilu and relu: one seed has no interval; ")


def test_seeds_count_when_all_their_runs_are_done(planned, capsys):
    comparison = planned(rates=[0.01], surrogates=["bsilu"])
    assert table(comparison)["verdict"] == "Not finished: 0 of 6 runs are; so far nothing is shown."
    assert main(["report", str(comparison.folder), "--output", str(comparison.folder / "report.html")]) == 1
    assert "has no seed yet of which all runs are finished" in capsys.readouterr().err
    for (name, _, seed), cell in comparison.cells.items():
        if seed < 2 and (name, seed) != ("sugar_bsilu", 1):
            finish(cell, 0.9, TESTS[name][seed])
    found = table(comparison)
    assert (found["seeds"], found["done"]) == ([0], 3)
    assert found["verdict"] == "Not finished: 3 of 6 runs are; so far nothing is shown."
    finish(comparison.cells["sugar_bsilu", 0.01, 1], 0.9, 0.84)
    assert table(comparison)["verdict"] == "Not finished: 4 of 6 runs are, and 2 seeds are too early a verdict."


def test_a_rate_with_which_a_loss_is_not_finite_is_not_chosen(planned):
    comparison = planned(rates=[0.01, 0.1], surrogates=["bsilu"], seeds=2)
    for (name, rate, seed), cell in comparison.cells.items():
        if rate == 0.1 and (name, seed) != ("relu", 0):
            diverge(cell)
        else:
            finish(cell, 0.99 if rate == 0.1 else 0.5, TESTS[name][seed])
    found = table(comparison)
    assert (found["done"], [row["rate"] for row in found["rows"]]) == (8, [0.01, 0.01])
    assert comparison.train() == {}  # no process is started for them again


def test_an_activation_without_a_rate(planned):
    comparison = planned(rates=[0.1], surrogates=["bsilu"], seeds=2)
    for (name, _, _), cell in comparison.cells.items():
        finish(cell, 0.5, 0.5) if name == "relu" else diverge(cell)
    assert "sugar_bsilu has no rate with which each loss stays finite" in table(comparison)["verdict"]


def test_the_grid_of_a_folder_grows(planned):
    first = planned(rates=[0.01], surrogates=["nelu"], seeds=1)
    finish_all(first)
    table(first)
    later = planned(rates=[0.001], surrogates=["bsilu"], seeds=2)
    assert (later.rates, later.surrogates, later.seeds) == ((0.001, 0.01), ("nelu", "bsilu"), (0, 1))
    assert len(later.cells) == 2 * 3 * 2
    same = planned()
    assert list(same.cells) == list(later.cells)
    assert table(same)["done"] == 2
    assert str(same.cells["sugar_bsilu", 0.001, 1].config.folder).endswith("compare/seed1/sugar_bsilu-lr0.001")


@pytest.mark.parametrize(
    ("model", "baseline"),
    [("resnet18", "relu"), ("test_vit", "gelu"), ("resnet18_sugar_bsilu", "relu"), ("conv2next_tiny", "gelu")],
)
def test_the_baseline_is_the_own_activation_or_relu(model, baseline, images, tmp_path):
    flags = ["--data", str(images), "--model", model, "--img-size", "160" if model == "test_vit" else "16"]
    comparison = plan(tmp_path, flags, ["elu"], [0.01], 1)
    own, sugar = (cell.config for cell in comparison.cells.values())
    assert comparison.baseline == baseline
    assert own.activation == Activation(act_layer="relu" if "sugar" in model else None)
    assert (sugar.surrogate, sugar.act_layer, sugar.lr, sugar.seed) == ("elu", None, 0.01, 0)


def test_weights_to_start_from(images, tmp_path):
    for name in ("relu", "sugar"):
        model = timm.create_model("resnet18", channels=(8, 8, 8, 8), num_classes=3)
        if name == "sugar":
            timm_sugar.convert(model, "nelu")
        timm.models.save_for_hf(model, tmp_path / name, data_config={"input_size": (3, 16, 16)})
        flags = ["--data", str(images), "--model", f"local-dir:{tmp_path / name}", "--img-size", "16"]
        comparison = plan(tmp_path / f"compare-{name}", flags, ["elu"], [0.01], 1)
        own, sugar = (cell.config for cell in comparison.cells.values())
        assert comparison.baseline == "relu"
        assert (own.act_layer, sugar.surrogate) == ("relu" if name == "sugar" else None, "elu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "0.1"], "--lr is what a comparison varies: it takes --seeds, --lrs and --surrogates"),
        (["--seed", "1"], "--seed is what a comparison varies"),
        (["--convert"], "--convert is what a comparison varies"),
        (["--resume", "never"], "--resume is not for a comparison"),
        (["--surrogates", "bsil"], "unknown surrogate 'bsil'; did you mean 'bsilu'?"),
        (["--model", "resnet81"], "did you mean"),
        (["--val-fraction", "0"], "so val_fraction must be above 0"),
        (["--lrs", "-1"], "lr must be at least 0"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--minutes", "0"], "minutes must be above 0, got 0"),
        (["--jobs", "0"], "jobs must be above 0, got 0"),
        (["--epoch", "3"], "unknown argument '--epoch'"),
        (["--data", "nowhere/at/all"], "data folder 'nowhere/at/all' does not exist"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(arguments, message, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "run", lambda *arguments: pytest.fail("it would train"))
    output = tmp_path / "compare"
    assert main(["compare", "--data", str(images), "--output", str(output), *SMALL, *arguments]) == 1
    out, err = capsys.readouterr()
    assert message in err
    assert (out, len(err.splitlines()), output.exists()) == ("", 1, False)


def test_other_settings_or_other_data_in_the_same_folder_are_refused(planned, images, tmp_path):
    comparison = planned(rates=[0.01], surrogates=["bsilu"])
    cell = next(iter(comparison.cells.values()))
    finish(cell, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"seed0/relu-lr0\.01 holds a run with epochs=1, not 2; give another --output"):
        plan(comparison.folder, ["--data", str(images), *SMALL, "--epochs", "2"])
    path = cell.config.folder / "config.yaml"
    path.write_text(to_yaml(read_mapping(path) | {"data_fingerprint": {"images": "others"}}))
    with pytest.raises(ValueError, match="was trained on other data than"):
        planned()


def accuracy_by_hand(folder: Path, images: Path) -> list[float]:
    network = find_model(str(folder)).load().eval()
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    found = []
    for label, name in enumerate(COLOURS):
        right = 0
        for path in (images / "test" / name).iterdir():
            pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
            with torch.no_grad():
                right += int(network(((pixels - mean) / std)[None]).argmax() == label)
        found.append(right / 5)
    return found


@pytest.mark.slow
def test_real_runs_stopped_by_the_clock_and_by_ctrl_c_and_gone_on_with(images, tmp_path, capsys):
    output = tmp_path / "compare"
    grid = ["--lrs", "0.01", "--seeds", "2", "--surrogates", "bsilu", "--jobs", "2"]
    argv = ["compare", "--data", str(images), "--output", str(output), *SMALL, *grid]
    assert main([*argv, "--minutes", "0.01"]) == 75
    out, err = capsys.readouterr()
    assert out == "Not finished: 0 of 4 runs are; so far nothing is shown.\n"
    assert "time is up; the same command goes on" in err

    process = subprocess.Popen([sys.executable, "-m", "timm_sugar.cli", *argv], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 240
    while not (output / "seed0/relu-lr0.01/metrics.jsonl").exists() and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, "run the same command to resume" in err) == (130, True), err

    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["done"], found["seeds"], found["classes"]) == (4, [0, 1], list(COLOURS))
    for row in found["rows"]:
        summaries = [read_mapping(output / run / "summary.json") for run in row["runs"]]
        assert row["test_top1"] == pytest.approx(np.mean([summary["test_top1"] for summary in summaries]))
        assert np.mean(row["class_top1"]) == pytest.approx(row["test_top1"])  # as many images of each class
    by_hand = [accuracy_by_hand(output / f"seed{seed}/relu-lr0.01", images) for seed in (0, 1)]
    assert found["rows"][0]["class_top1"] == pytest.approx(np.mean(by_hand, axis=0))
    assert Activation.of(find_model(str(output / "seed1/sugar_bsilu-lr0.01")).load()) == Activation("bsilu", 1.67)
    assert main(["report", str(output), "--output", str(tmp_path / "report.html")]) == 0
    assert found["verdict"] in (tmp_path / "report.html").read_text()
