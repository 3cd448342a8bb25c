"""The report: right numbers, nothing loaded, text escaped, commands that work, and the page in a browser."""

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from timm_sugar.analysis import gradient_norms, profile
from timm_sugar.analysis.report import class_tables, write_report
from timm_sugar.analysis.run import read_run, unique_names
from timm_sugar.analysis.seeds import group_by_seed
from timm_sugar.cli import main
from timm_sugar.hub import find_model, image_batches
from timm_sugar.training import load_config

VOID = {"meta", "link", "img", "input", "br", "source"}
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LOADING = {"src", "href", "srcset", "data", "action", "poster"}


class Page(HTMLParser):
    """The elements of a page; unbalanced tags are an error."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.scripts: dict[str, str] = {}
        self.text = self.title = ""
        self.images_without_text = 0
        self._script = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        given = dict(attrs)
        self.addresses += [value for name, value in attrs if name in LOADING]
        self.ids += [given["id"]] if "id" in given else []
        self.images_without_text += tag == "img" and not given.get("alt")
        if tag == "table":
            self._rows = self.tables.setdefault(given.get("id") or str(len(self.tables)), [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            assert tag == "td" or given["scope"] in ("row", "col")
            self._rows[-1].append("")
        elif tag == "script":
            self._script = given.get("id", str(len(self.scripts)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
            return
        if self.open and self.open[-1] == "title":
            self.title += data
        if {"td", "th"} & set(self.open):
            self._rows[-1][-1] += data
        self.text += data

    @property
    def charts(self) -> dict[str, dict]:
        return {chart["id"]: chart for chart in json.loads(self.scripts["charts"])}


def landscape(scale: float) -> dict:
    """What `loss_landscape` writes, for a bowl."""
    axis = [-0.25, 0.0, 0.25]
    loss = [[scale * (0.1 + x * x + y * y) for x in axis] for y in axis]
    loss[0][0] = None  # not finite
    top1 = [[None if v is None else 0.9 for v in row] for row in loss]
    sharp = dict(largest=3.5, largest_magnitude=3.5, residual=0.02, tolerance=0.01, iterations=9, converged=True)
    return dict(settings={"images": 40}, axis=axis, loss=loss, top1=top1, done=9, seconds=1.0, sharpness=sharp)


def profiled(run: Path) -> dict:
    """What the command profile writes, on the test images."""
    model = find_model(str(run))
    network = model.load()
    images = model.load_data(network, "digits").test
    gradients = gradient_norms(network, *next(image_batches(network, images)))
    return profile(network, image_batches(network, images)).to_dict() | {"split": "test", "gradients": gradients}


@pytest.fixture(scope="module")
def folders(runs, tmp_path_factory) -> list[Path]:
    """A SUGAR run and a ReLU run with profile and landscape, one that has done an epoch, one that has just begun."""
    folder = tmp_path_factory.mktemp("report")
    sugar, relu = (Path(shutil.copytree(run, folder / run.name)) for run in runs)
    for run, scale in ((sugar, 1.0), (relu, 9.0)):
        (run / "landscape.json").write_text(json.dumps(landscape(scale)))
        (run / "profile.json").write_text(json.dumps(profiled(run)))
    half, begun = folder / "half", folder / "begun"
    for run in (half, begun):
        run.mkdir()
        shutil.copy(sugar / "config.yaml", run)
    (half / "metrics.jsonl").write_text((sugar / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    return [sugar, relu, half, begun]


@pytest.fixture(scope="module")
def report(folders, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(folders, path)
    return path


@pytest.fixture(scope="module")
def page(report) -> Page:
    return Page(report.read_text(encoding="utf-8"))


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_the_page_is_whole_and_loads_nothing(page, report):
    assert page.addresses
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert all(address[1:] in page.ids for address in page.addresses if address.startswith("#"))
    assert len(page.ids) == len(set(page.ids))
    assert page.images_without_text == 0
    assert page.title == "4 runs compared · timm-sugar"
    assert {path.name for path in report.parent.glob("*.png")} == {
        f"report_{name}.png"
        for name in ("curves", "dead_units", "activation_profile", "landscape_contours", "landscape_surface")
    }


def test_the_numbers_are_those_of_the_runs_and_the_best_is_marked(page, folders):
    head, *rows = page.tables["summary-table"]
    cells = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert list(cells) == ["sugar", "relu", "half", "begun"]
    found = {folder.name: summary(folder) for folder in folders[:2]}
    for column, key, text, better in (
        ("test top-1 accuracy", "test_top1", lambda v: f"{100 * v:.2f}%", max),
        ("test loss", "test_loss", lambda v: f"{v:.4f}", min),
        ("time", "seconds", lambda v: f"{v:.0f} s", min),
        ("images/s", "images_per_second", lambda v: f"{v:,.0f}", max),
    ):
        values = {name: run[key] for name, run in found.items()}
        assert len(set(values.values())) == 2
        for name, value in values.items():
            assert cells[name][column].split()[0] == text(value).split()[0]
            assert cells[name][column].endswith("★ best") == (value == better(values.values()))
    assert [cells[name]["activation"] for name in ("sugar", "relu")] == ["SUGAR bsilu 1.67", "relu"]
    assert [row["state"] for row in cells.values()] == ["finished", "finished", "epoch 1 of 2", "epoch 0 of 2"]
    assert cells["half"]["test top-1 accuracy"] == cells["begun"]["validation top-1 accuracy"] == "–"  # noqa: RUF001
    assert not any("★" in cell for name in ("half", "begun") for cell in cells[name].values())


def test_the_charts_hold_the_metrics(page, folders):
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders[:3]]
    traces = page.charts["accuracy"]["data"]
    assert [trace["meta"] for trace in traces] == [0, 1, 2]
    assert [trace["y"] for trace in traces] == [[100 * line["val_top1"] for line in run] for run in lines]
    losses = {(trace["meta"], trace["line"]["dash"]): trace["y"] for trace in page.charts["loss"]["data"]}
    assert losses[1, "dot"] == [line["train_loss"] for line in lines[1]]
    assert losses[1, "solid"] == [line["val_loss"] for line in lines[1]]
    assert set(page.charts) >= {
        "learning-rate",
        "dead-units",
        "activation-sparsity",
        "dead-by-layer",
        "activation-1",
        "landscape-0",
    }
    profiles = [json.loads((folder / "profile.json").read_text()) for folder in folders[:2]]
    for number, found in enumerate(profiles):
        layers = found["layers"]
        bars = page.charts["dead-by-layer"]["data"][number]
        assert bars["y"] == [100 * layer["dead"] / layer["units"] for layer in layers]
        assert len(page.charts[f"activation-{number}"]["data"][0]["z"]) == len(layers) == 3
    sugar, relu = page.charts["gradients"]["data"][:2]
    assert (sugar["y"], relu["y"]) == tuple([row[k] for row in profiles[0]["gradients"]] for k in ("sugar", "relu"))
    contour = page.charts["landscape-1"]["data"][0]
    assert contour["z"][0][0] is None
    assert contour["customdata"][1][1] == [pytest.approx(0.9), 90.0]
    assert "3.5 ± 0.02" in page.text


def test_differences_and_commands(page, folders, tmp_path):
    differing = {row[0]: row[1:] for row in page.tables["differences"][1:]}
    assert differing.pop("act_layer") == ["–", "relu", "–", "–"]  # noqa: RUF001
    (found,) = {cell for cell in differing["gradients"] if cell != "–"}  # noqa: RUF001
    assert differing == {"gradients": [found, "–", found, found]}  # noqa: RUF001
    recipe, rest = page.text.split("cat > relu.yaml <<'END_OF_RECIPE'\n")[1].split("END_OF_RECIPE\n", 1)
    assert rest.startswith("accelerate launch -m timm_sugar.training --recipe relu.yaml --output output/relu\n")
    (tmp_path / "relu.yaml").write_text(recipe)
    argv = ["--recipe", str(tmp_path / "relu.yaml"), "--output", "output/relu"]
    config = vars(load_config(argv, "digits", "", "digits"))
    wanted = yaml.safe_load((folders[1] / "config.yaml").read_text())
    assert config == {name: wanted[name] for name in config} | {"output": "output/relu"}


def test_classes_with_the_lowest_accuracy_first(page, folders, tmp_path):
    assert "confusion matrix" in page.text
    found = dict(test_class_top1={"a": 0.75, "<b>": 0.5, "c": None}, test_confusion=[[3, 1, 0], [0, 1, 1], [0, 0, 0]])
    by_class, confusion = class_tables(found)
    assert by_class == (
        ["class", "test top-1 accuracy by class", "images", "taken for"],
        [["<b>", "50.00%", "2", "c (1)"], ["a", "75.00%", "4", "<b> (1)"], ["c", "–", "0", "–"]],  # noqa: RUF001
    )
    assert confusion == (["", "a", "<b>", "c"], [["a", "3", "1", "0"], ["<b>", "0", "1", "1"], ["c", "0", "0", "0"]])
    assert class_tables(found | {"test_confusion": None})[1] is None


def test_one_run_and_text_that_looks_like_html(folders, tmp_path):
    evil = "<img src=x onerror=alert(1)>'\"&"
    run = Path(shutil.copytree(folders[2], tmp_path / evil))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"] = "</script><script>alert(1)</script>"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    write_report([run], tmp_path / "out/report.html")
    page = Page((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    assert page.title == f"Run {evil} · timm-sugar"
    assert page.tables["summary-table"][1][0] == evil
    assert page.charts["accuracy"]["data"][0]["name"].startswith("&lt;img")
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert "differences" not in page.tables


def test_command_line(folders, tmp_path, capsys, monkeypatch):
    output = tmp_path / "new/report.html"
    assert main(["report", str(folders[3]), "--output", str(output)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(output)]
    assert "No epoch has ended yet" in Page(output.read_text(encoding="utf-8")).text

    broken = Path(shutil.copytree(folders[2], tmp_path / "broken"))
    (broken / "metrics.jsonl").write_text('{"epoch": 1')
    for argv, message in (
        ([str(tmp_path)], "is no run's folder: it has no config.yaml"),
        ([str(broken)], "metrics.jsonl cannot be read"),
        ([str(folders[0]), str(folders[0])], "the same folder is given twice"),
        ([str(folders[0]), "--output", str(tmp_path)], "must end in .html"),
    ):
        assert main(["report", *argv]) == 1
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        assert message in err
    monkeypatch.setitem(__import__("sys").modules, "plotly", None)
    assert main(["report", str(folders[0])]) == 1
    assert "timm-sugar[report]" in capsys.readouterr().err


def test_names_are_as_long_as_they_must_be():
    assert unique_names(["a/x", "a/y"]) == ["x", "y"]
    assert unique_names(["seed1/relu", "seed2/relu", "seed2/sugar"]) == ["seed1/relu", "seed2/relu", "seed2/sugar"]
    with pytest.raises(ValueError, match="twice"):
        unique_names(["a/x", "a/x"])
    here = Path.cwd()
    assert unique_names(["."]) == [here.name]
    with pytest.raises(ValueError, match="twice"):
        unique_names([".", here])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", "data: digits\n", "it has no model"),
        ("metrics.jsonl", '{"epoch": 1}\n{"train_loss": 0.1}\n', "it has no epoch"),
        ("metrics.jsonl", "[1]\n", "a line of it is no dict"),
        ("profile.json", '{"images": 1, "layers": []}', "it has no dead_units"),
        ("landscape.json", '{"settings": {}, "axis": [], "loss": []}', "it has no done"),
    ],
)
def test_a_file_without_what_is_shown_is_named(file, content, message, tmp_path):
    (tmp_path / "config.yaml").write_text("data: digits\nmodel: resnet18\n")
    assert read_run(tmp_path, "run").metrics == []
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=f"{file} cannot be read: {message}"):
        read_run(tmp_path, "run")


def seeds_of(run: Path, folder: Path, accuracies: list[float]) -> list[Path]:
    """Copies of a run with other seeds and validation accuracies, the last of them not finished."""
    copies = []
    for seed, accuracy in enumerate(accuracies):
        copy = Path(shutil.copytree(run, folder / f"seed{seed}" / run.name))
        settings = yaml.safe_load((copy / "config.yaml").read_text())
        (copy / "config.yaml").write_text(yaml.safe_dump(settings | {"seed": seed, "output": str(copy)}))
        lines = [
            json.loads(line) | {"val_top1": accuracy} for line in (copy / "metrics.jsonl").read_text().splitlines()
        ]
        (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (copy / "summary.json").write_text(json.dumps(summary(copy) | {"seed": seed, "val_top1": accuracy}))
        copies.append(copy)
    (copies[-1] / "summary.json").unlink()
    return copies


def test_seeds_are_one_row_and_one_curve(folders, tmp_path):
    sugar = seeds_of(folders[0], tmp_path, [0.8, 0.9, 0.85, 0.1])
    write_report([*sugar, folders[1]], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    head, row, relu = page.tables["summary-table"]
    alone = f"{folders[1].parent.name}/relu"
    assert (row[0], relu[0], head.count("seeds")) == ("sugar", alone, 1)
    cells = dict(zip(head, row, strict=True))
    half = 4.302653 * 0.05 / 3**0.5  # of three finished runs: t with 2 degrees of freedom, standard deviation 0.05
    assert cells["validation top-1 accuracy"].split(" ★")[0] == f"85.00% ± {100 * half:.2f}%"
    assert (cells["seeds"], cells["state"]) == ("0, 1, 2", "3 of 4 finished")
    each = page.tables["each-run"]
    assert [line[0] for line in each[1:]] == [
        *(f"seed{seed}/sugar" for seed in range(4)),
        f"{folders[1].parent.name}/relu",
    ]
    band, curve, other = page.charts["accuracy"]["data"]
    assert (band["meta"], curve["meta"], other["meta"]) == (0, 0, 1)
    assert curve["y"] == pytest.approx([85, 85])
    assert band["y"] == pytest.approx([85 - 100 * half] * 2 + [85 + 100 * half] * 2, rel=1e-5)
    assert (band["x"], curve["x"]) == ([1, 2, 2, 1], [1, 2])
    assert page.tables["differences"][0] == ["setting", "sugar", alone]
    assert "activation-4" in page.charts  # the profile of each run


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(folders, tmp_path):
    first, second = (read_run(run, name) for run, name in zip(folders[:2], "ab", strict=True))
    assert list(group_by_seed([first, second])) == ["a", "b"]
    again = replace(first, name="b-0")
    assert list(group_by_seed([replace(first, name="a-0"), again])) == ["a-0", "b-0"]  # the same seed
    seeds = [replace(first, name=f"lr0.1-s{seed}", settings=first.settings | {"seed": seed}) for seed in (1, 2)]
    assert {name: len(runs) for name, runs in group_by_seed(seeds).items()} == {"lr0.1": 2}
    other = replace(seeds[0], settings=seeds[0].settings | {"lr": 0.5})
    assert list(group_by_seed([other, replace(seeds[1], name="x")])) == ["lr0.1-s1", "x"]
    data = replace(seeds[0], name="y", settings=seeds[0].settings | {"data_fingerprint": {"train": "else"}})
    assert len(group_by_seed([data, seeds[1]])) == 2


def test_where_no_unit_is_dead_the_page_says_so(folders, tmp_path):
    for place, run in enumerate(folders[:2]):
        copy = Path(shutil.copytree(run, tmp_path / run.name))
        found = json.loads((copy / "profile.json").read_text())
        for layer in found["layers"]:
            layer["dead"] = 0
        (copy / "profile.json").write_text(json.dumps(found))
        write_report([copy], tmp_path / f"{place}.html")
        page = Page((tmp_path / f"{place}.html").read_text(encoding="utf-8"))
        assert "dead-by-layer" not in page.charts
        assert f"No unit is dead in any layer. Dead are, of {run.name}: 0 of 24 units." in page.text


BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: one of {', '.join(BROWSERS)}")
def test_in_a_browser(report):
    """At phone and desktop width, light and dark: charts are drawn, nothing overflows, fails or is fetched."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        colours = set()
        for width, scheme in ((390, "light"), (390, "dark"), (1280, "light")):
            context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
            tab = context.new_page()
            problems, requests = [], []
            tab.on("console", lambda message, problems=problems: problems.append(message.text))
            tab.on("pageerror", lambda error, problems=problems: problems.append(str(error)))
            tab.on("request", lambda request, requests=requests: requests.append(request.url))
            tab.goto(report.as_uri())
            tab.wait_for_function("document.querySelectorAll('.chart .main-svg').length > 0")
            assert (problems, requests) == ([], [report.as_uri()])
            assert tab.evaluate("[...document.querySelectorAll('.chart')].every(c => c.querySelector('.main-svg'))")
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            colours.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
            colours.add(tab.evaluate("document.querySelector('.xtick text').style.fill"))

            lines = "document.querySelectorAll('#accuracy .scatterlayer .trace').length"
            assert tab.evaluate(lines) == 3
            tab.locator("#toggles input").nth(1).focus()
            tab.keyboard.press("Space")
            tab.wait_for_function(f"{lines} === 2")
            assert tab.locator("#figure-landscape-1").is_hidden()
            assert tab.locator("#figure-landscape-0").is_visible()
            context.close()
        assert len(colours) == 4  # page and text, light and dark
        browser.close()
