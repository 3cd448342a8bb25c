"""Cards: what they say, that nothing in a run's files can change their structure, and the facts beside the numbers."""

import json
import re
from dataclasses import asdict

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from timm_sugar.hub import read_facts
from timm_sugar.hub.card import dataset_of, escape, model_card, public_settings, told_settings
from timm_sugar.settings import TrainConfig

RUN = dict(
    data="cifar10", test_top1=0.71234, test_top5=0.98, val_top1=0.7, dead_units=0.01, activation_sparsity=0.55,
    parameters=12345678, train_images=45000, epochs=2, best_epoch=2, seed=42, settings=dict(epochs=2, split_seed=7),
)  # fmt: skip
CONFIG = dict(
    architecture="resnet18",
    num_classes=3,
    label_names=["ant", "bee", "cat"],
    timm_sugar=dict(architecture="resnet18_sugar_bsilu", surrogate="bsilu", alpha=1.67),
)
FACTS = """
dataset_note: JPEG re-encoding.
limits: "Only for <b>small</b> images."
paper: {top1: 0.8642, std: 0.0033, where: table 4}
baseline: baseline.json
"""


@pytest.fixture
def facts_file(tmp_path):
    (tmp_path / "facts.yaml").write_text(FACTS)
    (tmp_path / "baseline.json").write_text(json.dumps(RUN | dict(test_top1=0.6, seed=1)))
    return tmp_path / "facts.yaml"


def _html(card: str) -> str:
    return MarkdownIt("commonmark").enable("table").render(ModelCard(card).text)


def test_results_beside_the_papers_and_the_baselines(facts_file):
    card = model_card(CONFIG, RUN, "lab/net", read_facts(facts_file), curves="curves.png")
    html = _html(card)
    table = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", html, re.DOTALL)]
    assert table[0] == ["", "this model", "plain ReLU", "the paper"]
    assert table[1] == ["test top-1 accuracy", "71.23%", "60.00%", "86.42% ± 0.33%"]
    assert ["activation sparsity", "55.00%", "55.00%", ""] in table
    for shown in ("table 4", "JPEG re-encoding.", "curves.png", "12,345,678", "45,000", "arXiv:2505.22074"):
        assert shown in html
    assert 'hf-hub:lab/net"' in card
    assert "FOLDER" not in card
    assert "&lt;b&gt;small" in html
    assert html.count("<img") == 1


def test_without_facts_there_is_one_column_and_no_claim_about_others():
    html = _html(model_card(CONFIG, RUN))
    assert "<th>the paper</th>" not in html
    assert "plain ReLU</th>" not in html
    assert "<img" not in html


def test_metadata():
    data = ModelCard(model_card(CONFIG, RUN, "lab/net")).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "timm", "image-classification")
    assert (data.datasets, data.model_name) == (["uoft-cs/cifar10"], "net")
    (result,) = data.eval_results
    assert (result.metric_value, result.dataset_type, result.dataset_args) == (
        0.7123,
        "uoft-cs/cifar10",
        {"split_seed": 7},
    )


def test_settings_are_those_that_differ_from_the_defaults_and_the_images():
    settings = asdict(TrainConfig(lr=0.5, opt="sgd", output="out")) | {"processes": 2, "left_open": ["mean"]}
    assert told_settings(settings) == {
        "data": "digits", "val_fraction": 0.1, "split_seed": 0, "lr": 0.5, "processes": 2
    }  # fmt: skip
    card = model_card(CONFIG, RUN | dict(settings=settings))
    assert "```yaml\ndata: digits\nval_fraction: 0.1\nsplit_seed: 0\nlr: 0.5\nprocesses: 2\n```" in card
    assert "The optimizer is timm's `sgd`, with Nesterov's momentum." in card
    assert "Nesterov" not in model_card(CONFIG, RUN | dict(settings=settings | {"opt": "adamw"}))


HOSTILE = [
    "<script>alert(1)</script>",
    "a](http://evil)",
    "x\n\n# Title",
    "`code`",
    "---",
    "{{ 7 * 7 }}",
    "| cell |",
    "![](x)",
]


def test_text_of_a_runs_files_stays_text():
    settings = {"model_args": {"note": "```\n<script>alert(1)</script>\n# Title"}, "data": "/home/<i>me"}
    run = RUN | dict(data="/home/me/<i>data", settings=settings)
    own = dict(architecture="resnet18_sugar_bsilu", surrogate="<u>bsilu", alpha=1.67)
    run |= dict(seed="<b>1", epochs="<b>2", best_epoch=None)
    card = model_card(CONFIG | dict(label_names=HOSTILE, timm_sugar=own), run)
    html = _html(card)
    for tag in ("<script", "<i>", "<b>", "<u>", "<img", 'http://evil"', "<h1>Title"):
        assert tag not in html
    assert [t for t in re.findall('<a href="(.*?)"', html) if "evil" in t] == []
    assert "{{ 7 * 7 }}" in html
    shown = re.search("<h2>Classes</h2>\n<p>(.*?)</p>", html, re.DOTALL)[1]
    assert "a](http://evil), x # Title, `code`, ---," in shown
    assert ModelCard(card).data.eval_results


def test_no_path_of_a_machine():
    settings = {"data": "/home/me/photos", "output": "/home/me/out", "resume": "auto", "act_layer": None}
    settings |= {"model_args": {"file": "/home/me/weights.bin", "list": ["~/x/y", "..\\z", "C:\\me\\w", 3]}, "lr": 0.1}
    card = model_card(CONFIG, RUN | dict(data=settings["data"], settings=settings))
    assert "home" not in card
    assert "--data DATA" in card
    kept = public_settings(settings, None)
    assert kept["data"] == "photos"
    assert kept["model_args"]["file"] == "weights.bin"
    assert kept["model_args"]["list"][0] == "y"
    assert kept["model_args"]["list"][2:] == ["w", 3]
    assert "output" not in kept


def test_a_local_folder_that_looks_like_a_hub_id(tmp_path, monkeypatch):
    assert dataset_of("photos/cats") == ("photos/cats", "cats")
    (tmp_path / "photos/cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert dataset_of("photos/cats") == (None, "cats")


def test_escape_shows_text_as_it_is():
    text = "a_b*c `d` <e> &amp; [f](g) #h |i| ~j~ \\k"
    assert MarkdownIt("commonmark").render(escape(text)) == (
        "<p>a_b*c `d` &lt;e&gt; &amp;amp; [f](g) #h |i| ~j~ \\k</p>\n"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("dataset_notes: x", "did you mean 'dataset_note'"),
        ("paper: {top1: 86.4, where: x}", "top1, a fraction of 1"),
        ("paper: 0.8", "paper must have"),
        ("limits: 3", "limits must be text"),
        ("- x", "must hold names and values"),
    ],
)
def test_wrong_facts(tmp_path, content, message):
    (tmp_path / "facts.yaml").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_facts(tmp_path / "facts.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "text", "base"),
    [
        ("resnet18.a1_in1k", r"resnet18.a1\_in1k", "timm/resnet18.a1_in1k"),
        ("hf-hub:org/name@0123", "org/name", "org/name"),
        ("local-dir:/home/me/secret/flowers/model", "flowers", None),
        ("weights.safetensors", "weights.safetensors", None),
    ],
)
def test_a_card_says_what_was_fine_tuned(source, text, base):
    assert "Fine-tuned" not in model_card(CONFIG, RUN)
    card = model_card(CONFIG, RUN | {"settings": RUN["settings"] | {"pretrained": source}, "pretrained": source})
    link = f"[{text}](https://huggingface.co/{base})" if base else text
    assert f"\nFine-tuned from {link}, whose weights it started from.\n" in card
    assert ModelCard(card).data.get("base_model") == base
    published = public_settings({"pretrained": source, "weights": {"source": source}}, None)
    assert model_card(CONFIG, RUN | {"pretrained": published["pretrained"]}).count(f"Fine-tuned from {link}") == 1
    assert published["weights"]["source"] == published["pretrained"]
    assert "secret" not in str(published)
    assert "secret" not in card
