"""A published model, loaded everywhere: stock timm, transformers, this package, by tag, offline."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file

import timm_sugar
from timm_sugar.hub import write_model_folder
from timm_sugar.layers import Activation
from timm_sugar.models import build

RUN = dict(data="digits", test_top1=0.5, seed=1, epochs=1, best_epoch=1, train_images=9, parameters=9, settings={})
DATA_CONFIG = dict(
    input_size=(3, 32, 32), interpolation="bicubic", crop_pct=1.0, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
)


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (32, 32), (210, 30, 40)).save(tmp_path / "image.png")
    return tmp_path


def _snippets(card: str) -> list[str]:
    return re.findall("```python\n(.*?)```", card, re.DOTALL)


def test_snippets_of_a_published_card(hub, cli, run_folder, environment, image):
    assert cli("publish", run_folder, "--repo-id", "lab/snippets").status == 0
    alone, plugin, transformers = _snippets(hub.files("lab/snippets")["README.md"].decode())
    without = "import sys\nassert not any(name.startswith('timm_sugar') for name in sys.modules)\n"
    script = alone + transformers + without + plugin + "\nprint(model.num_classes)"
    done = _python(script, environment | {"HF_TOKEN": ""}, image)
    first, scores, classes = done.splitlines()
    assert first.split()[0] == "red"
    assert max(eval(scores), key=lambda s: s["score"])["label"] == "red"
    assert float(first.split()[1]) == pytest.approx(max(s["score"] for s in eval(scores)), abs=1e-4)
    assert classes == "5"


# Executes the snippets of each folder's card, and compares what they load with the network that was packaged.
LOAD_EVERYWHERE = """
import contextlib, io, os, re, sys, torch
from safetensors.torch import load_file
for folder in {folders}:
    card = open(folder + "/README.md").read().replace("FOLDER", folder)
    alone, *plugin, pipeline_snippet = re.findall("```python\\n(.*?)```", card, re.DOTALL)
    names, shown = {{}}, io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(alone, names)
        exec(pipeline_snippet, names)
    label, probability = shown.getvalue().splitlines()[0].split()
    scores = {{score["label"]: score["score"] for score in names["classify"]("image.png")}}
    assert abs(scores[label] - float(probability)) < 1e-4, folder
    from transformers import AutoModelForImageClassification
    auto = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert auto.dtype == torch.float32
    expected = load_file(folder + "/../expected.safetensors")
    with torch.no_grad():
        for logits in (names["model"](expected["images"]), auto(expected["images"]).logits):
            torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)
    assert ("timm_sugar" in sys.modules) == {plugin}
    if {plugin}:
        exec(*plugin, names)
        assert names["model"].num_classes == 5
    print(os.path.basename(os.path.dirname(folder)))
"""
STOCK = {
    "resnet18_sugar_bsilu": dict(channels=(8, 8, 8, 8)),
    "vgg11": dict(surrogate="bsilu", mlp_ratio=1 / 64),
    "convnext_atto": dict(surrogate="nelu", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "vit_tiny_patch16_224": dict(surrogate="bsilu", depth=2, img_size=32),
}
OWN = {
    "swin_tiny_sugar_nelu": dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), img_size=64),
    "conv2next_sugar": dict(depths=(1, 1, 1, 1), dims=(16, 16, 32, 32)),
    "conv2next_tiny": dict(depths=(1, 1, 1, 1), dims=(16, 16, 32, 32), surrogate="nelu"),
    "resnet18_cifar_sugar_bsilu": dict(channels=(8, 8, 8, 8)),
    "vgg16_cifar_sugar_bsilu": dict(cfg=[8, "M", 8, "M"]),
}


def _package(root, networks: dict[str, dict]) -> list[str]:
    """Package networks with random weights, beside images and their logits; return the folders."""
    folders = []
    for name, arguments in networks.items():
        torch.manual_seed(0)
        model = build(name, num_classes=3, **arguments).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=0.5 if parameter.dim() == 1 else 0.0, std=0.1)
        size = arguments.get("img_size", 32)
        folder = root / name / "model"
        data_config = DATA_CONFIG | {"input_size": (3, size, size)}
        write_model_folder(folder, model, name, ("ant", "bee", "cat"), data_config, RUN)
        images = torch.randn(2, 3, size, size)
        expected = {"images": images, "logits": model(images).detach()}
        assert not torch.equal(expected["logits"][0], expected["logits"][1])
        save_file(expected, root / name / "expected.safetensors")
        folders.append(str(folder))
    return folders


def test_stock_architectures_load_without_this_package(environment, image):
    script = LOAD_EVERYWHERE.format(folders=_package(image, STOCK), plugin=False)
    assert _python(script, environment | {"HF_HUB_OFFLINE": "1"}, image).split() == list(STOCK)


def test_own_architectures_load_with_this_package(cli, image):
    script = f"import os\nos.chdir({str(image)!r})\n" + LOAD_EVERYWHERE.format(
        folders=_package(image, OWN), plugin=True
    )
    result = cli.python(script, HF_HUB_OFFLINE="1")
    assert result.status == 0, result.err
    assert result.out.split() == list(OWN)
    card = (image / "swin_tiny_sugar_nelu/model/README.md").read_text()
    assert "import timm_sugar` must come first" in card
    alone, _, transformers = _snippets(card)
    assert alone.startswith("import timm\nimport timm_sugar\n")
    assert transformers.startswith("import timm_sugar\n")


def test_a_folder_without_our_record_is_what_timm_makes_of_it(tmp_path):
    stock = timm.create_model("resnet18", channels=(8, 8, 8, 8), num_classes=3)
    timm.models.save_for_hf(stock, tmp_path, safe_serialization=True)
    loaded = timm_sugar.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), stock.state_dict().values(), strict=True)
    )
    assert Activation.of(loaded) == Activation(None, None)
    converted = timm_sugar.create_model(f"local-dir:{tmp_path}", pretrained=True, surrogate="nelu", alpha=0.2)
    assert Activation.of(converted) == Activation("nelu", 0.2)
    assert torch.equal(converted.conv1.weight, stock.conv1.weight)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"is no published model: it has no model\.safetensors") as error:
        timm_sugar.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert "\n" not in str(error.value)


def test_a_repository_without_our_record(hub, cli, tmp_path):
    stock = timm.create_model("resnet18", channels=(8, 8, 8, 8), num_classes=3)
    timm.models.save_for_hf(stock, tmp_path, safe_serialization=True)
    _put(hub, "stranger/net", tmp_path)
    hub.create("stranger/pickled")
    hub.add_commit("stranger/pickled", "main", hub.files("stranger/net") | {"model.safetensors": None}, "")
    hub.add_commit("stranger/pickled", "main", {"pytorch_model.bin": b"pickle"}, "")
    result = cli.python(LOAD + "describe(timm_sugar.create_model('hf-hub:stranger/net', pretrained=True))")
    assert result.status == 0, result.err
    assert json.loads(result.out)[:3] == [3, None, None]
    result = cli.python("import timm_sugar\ntimm_sugar.create_model('hf-hub:stranger/pickled', pretrained=True)")
    assert result.status == 1
    assert "model.safetensors" in result.err
    assert hub.count("GET", "bin") == 0


CLAIM = """---
model-index:
- name: net
  results:
  - task: {type: image-classification}
    dataset: {type: colours, name: colours}
    metrics:
    - {type: accuracy, value: 0.5}
---
"""


def test_only_checked_safetensors_are_loaded(hub, cli, parquet_folder, tmp_path):
    stock = timm.create_model("resnet18", channels=(8, 8, 8, 8), num_classes=3)
    timm.models.save_for_hf(stock, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    load = "import timm_sugar\ntimm_sugar.create_model('hf-hub:{}', pretrained=True)"

    _put(hub, "stranger/corrupt", tmp_path)
    hub.fail("GET", "/lfs/", "corrupt")
    assert "model.safetensors is corrupted" in cli.python(load.format("stranger/corrupt")).err

    config["pretrained_cfg"]["hf_hub_filename"] = "other.bin"
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(stock.state_dict(), tmp_path / "other.bin")
    (tmp_path / "README.md").write_text(CLAIM)
    _put(hub, "stranger/decoy", tmp_path)
    for result in (cli.python(load.format("stranger/decoy")), cli("verify", tmp_path, "--data", parquet_folder)):
        assert result.status == 1
        assert "it names 'other.bin' as its weights; only model.safetensors is loaded" in result.err
    assert hub.count("GET", "bin") + hub.count("HEAD", "bin") == 0


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("resnet18", {"num_classes": 10**9}, r"its model has [\d,]+ numbers in fc\.\w+, and model\.safetensors \d+"),
        ("resnet18", {"model_args": {"channels": [2**10] * 4}}, r"its model has [\d,]+ numbers in \S+"),
        ("resnet18", {"model_args": {"channels": [2**30] * 4}}, "its model cannot be built: Storage size"),
        ("resnet18", {"architecture": "resnet152"}, r"its model has [\d,]+ numbers"),
        ("resnet18", {"input_size": [3, 10**5, 10**5]}, "it takes 100000 pixels from 105263; a side is at most 4096"),
        ("resnet18", {"crop_pct": 1e-6}, "it takes 32 pixels from 32000000"),
        ("vit_tiny_patch16_224", {"model_args": {"img_size": 10**5, "depth": 1}}, "it takes 100000 pixels"),
    ],
)
def test_a_config_that_asks_for_more_than_the_weights_hold(tmp_path, name, change, message):
    small = dict(channels=(8, 8, 8, 8)) if name == "resnet18" else dict(depth=1, img_size=32)
    timm.models.save_for_hf(timm.create_model(name, num_classes=3, **small), tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= {"input_size": [3, 32, 32]}
    for key, value in change.items():
        (config if key in config else config["pretrained_cfg"])[key] = value
    config["model_args"].pop("num_classes", None)  # as packages have none
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        timm_sugar.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert "\n" not in str(error.value)


def _python(script: str, environment: dict[str, str], folder, *argv: str) -> str:
    command = [sys.executable, "-c", script, *argv]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD = """
import json, timm, timm_sugar, torch
from timm_sugar.layers import Activation
def describe(model):
    x = torch.full((1, 3, 32, 32), 0.5, requires_grad=True)
    own = Activation.of(model)
    names = list(model.pretrained_cfg.get("label_names") or [])
    print(json.dumps([model.num_classes, own.surrogate, own.alpha, names]))
"""


def test_the_surrogate_is_restored_and_gives_gradients(hub, cli, run_folder):
    assert cli("publish", run_folder, "--repo-id", "lab/restored").status == 0
    result = cli.python(
        LOAD
        + """
model = timm_sugar.create_model("hf-hub:lab/restored", pretrained=True)
describe(model)
x = torch.tensor([-0.5], requires_grad=True)
model.act1(x * 1).sum().backward()
print(x.grad.item())
plain = timm.create_model("hf-hub:lab/restored", pretrained=True)
x = torch.tensor([-0.5], requires_grad=True)
plain.act1(x * 1).sum().backward()
print(x.grad.item())
images = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    print(torch.equal(model.eval()(images), plain.eval()(images)))
"""
    )
    assert result.status == 0, result.err
    described, gradient, plain, equal = result.out.splitlines()
    assert json.loads(described) == [3, "bsilu", 1.67, ["blue", "green", "red"]]
    assert float(gradient) > 0.05
    assert (float(plain), equal) == (0.0, "True")


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """Folders as they are published, of the network that an entrypoint builds by itself, under two tags."""
    root = tmp_path_factory.mktemp("hub")
    for tag, arguments in (("first", {}), ("second", dict(surrogate="nelu", alpha=0.1))):
        torch.manual_seed(0)
        model = build("resnet18_sugar_bsilu", num_classes=3, **arguments)
        folder = root / f"resnet18_sugar_bsilu.{tag}"
        write_model_folder(folder, model, "resnet18_sugar_bsilu", ("ant", "bee", "cat"), DATA_CONFIG, RUN)
    return root


CREATE = LOAD + "describe(timm.create_model({name!r}, pretrained=True{more}))\n"


def _create(cli, hub_place, name, more="", **env):
    return cli.python(CREATE.format(name=name, more=more), TIMM_SUGAR_HUB=str(hub_place), **env)


# Loads the models that it is given, and says how long that took or what went wrong.
FRESH = """
import sys, time, timm, timm_sugar
for name in sys.argv[1:]:
    start = time.perf_counter()
    try:
        loaded = timm.create_model(name, pretrained=True)
        print(name, loaded.num_classes, timm.get_pretrained_cfg(name).num_classes)
    except RuntimeError as error:
        print(f"{time.perf_counter() - start:.2f} {error}")
"""
NO_NETWORK = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}


def test_a_checkout_brings_its_weights(environment, tmp_path):
    names = ("swin_tiny_sugar_nelu", "swin_tiny_sugar_nelu.tin_64", "resnet18_sugar_bsilu")
    out = _python(FRESH, environment | NO_NETWORK, tmp_path, *names)
    assert out.splitlines() == [
        "swin_tiny_sugar_nelu 200 1000",
        "swin_tiny_sugar_nelu.tin_64 200 200",
        "resnet18_sugar_bsilu 10 1000",
    ]


def test_an_installed_package_without_a_network_says_so_at_once(environment, tmp_path):
    shutil.copytree(Path(timm_sugar.__file__).parent, tmp_path / "site/timm_sugar")
    installed = environment | NO_NETWORK | {"PYTHONPATH": str(tmp_path / "site")}
    seconds, _, message = _python(FRESH, installed, tmp_path, "resnet18_sugar_bsilu").partition(" ")
    assert float(seconds) < 3
    for part in (
        "hf-hub:timm-sugar/resnet18_sugar_bsilu.cifar10 cannot be loaded",
        "the Hub at http://127.0.0.1:9 cannot be reached",
        "TIMM_SUGAR_HUB may name a folder",
        "--model resnet18_sugar_bsilu",
    ):
        assert part in message
    assert message.count("\n") == 1


# timm downloads its own models by itself; huggingface_hub would wait between its attempts.
OF_TIMM = """
import time, timm_sugar

def no_wait(seconds):
    raise AssertionError(f"waits for {seconds} s")

time.sleep = no_wait
for attempt in range(2):
    try:
        timm_sugar.create_model("resnet18.a1_in1k", pretrained=True)
    except ConnectionError as error:
        print(error)
"""


def test_weights_of_timm_without_a_network_fail_at_once(environment, tmp_path):
    out = _python(OF_TIMM, environment | NO_NETWORK, tmp_path)
    first, second = out.splitlines()
    assert first == second
    assert first.startswith("the Hub at http://127.0.0.1:9 cannot be reached (")


def test_what_was_loaded_before_needs_no_network(hub, cli, full_size, environment, tmp_path):
    _put(hub, "lab/cached", full_size / "resnet18_sugar_bsilu.second")
    script = LOAD + "describe(timm_sugar.create_model('hf-hub:lab/cached', pretrained=True))"
    assert cli.python(script).status == 0
    code = f"import time\nstart = time.perf_counter()\n{script}\nprint(time.perf_counter() - start)"
    described, seconds = _python(code, environment | NO_NETWORK, tmp_path).splitlines()
    assert json.loads(described)[:3] == [3, "nelu", 0.1]
    assert float(seconds) < 15  # importing torch included; huggingface_hub's own retries take 23 more


def test_the_environment_decides_where_weights_come_from(cli, full_size):
    here = json.loads(cli("models", "--json").out)
    sources = {row["name"]: row["weights"] for row in here}
    folder = Path(timm_sugar.__file__).parents[1] / "hub_cards/swin_tiny_sugar_nelu.tin_64"
    assert sources["swin_tiny_sugar_nelu"] == {"tin_64": f"local-dir:{folder}"}
    elsewhere = json.loads(cli("models", "--json", TIMM_SUGAR_HUB=str(full_size)).out)
    sources = {row["name"]: row["weights"] for row in elsewhere}
    assert sources["swin_tiny_sugar_nelu"] == {}
    assert sources["resnet18_sugar_bsilu"] == {
        tag: f"local-dir:{full_size}/resnet18_sugar_bsilu.{tag}" for tag in ("first", "second")
    }
    assert f"tin_64 ({folder})" in cli("models").out


def test_tags_of_a_folder(hub, cli, full_size):
    for tag, activation in (("first", ["bsilu", 1.67]), ("second", ["nelu", 0.1])):
        result = _create(cli, full_size, f"resnet18_sugar_bsilu.{tag}")
        assert result.status == 0, result.err
        assert json.loads(result.out) == [3, *activation, ["ant", "bee", "cat"]]
    assert hub.requests == []


def test_other_classes_keep_the_backbone(cli, full_size):
    result = cli.python(
        LOAD
        + """
three = timm.create_model("resnet18_sugar_bsilu.first", pretrained=True)
seven = timm.create_model("resnet18_sugar_bsilu.first", pretrained=True, num_classes=7, in_chans=1, surrogate="elu")
describe(seven)
print(torch.equal(three.layer4[1].conv2.weight, seven.layer4[1].conv2.weight), seven.conv1.in_channels)
""",
        TIMM_SUGAR_HUB=str(full_size),
    )
    assert result.status == 0, result.err
    described, rest = result.out.splitlines()
    assert json.loads(described)[:3] == [7, "elu", 1.0]
    assert rest == "True 1"


def test_the_only_tag_is_the_default(cli, full_size, tmp_path):
    (tmp_path / "resnet18_sugar_bsilu.first").symlink_to(full_size / "resnet18_sugar_bsilu.first")
    for code in ('timm.create_model("resnet18_sugar_bsilu", pretrained=True)', "resnet.resnet18_sugar_bsilu(True)"):
        code = f"{LOAD}from timm_sugar.models import resnet\ndescribe({code})"
        result = cli.python(code, TIMM_SUGAR_HUB=str(tmp_path))
        assert result.status == 0, result.err
        assert json.loads(result.out)[:3] == [3, "bsilu", 1.67]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18_sugar_bsilu", "it has resnet18_sugar_bsilu.first, resnet18_sugar_bsilu.second"),
        ("resnet18_sugar_bsilu.third", "No pretrained weights exist for resnet18_sugar_bsilu.third in the folder"),
        ("vgg16_sugar_bsilu", "it has none of vgg16_sugar_bsilu. Train them with"),
        ("resnet18_sugar_bsilu...", "No pretrained weights exist for resnet18_sugar_bsilu..."),
    ],
)
def test_missing_tags(cli, full_size, name, message):
    last = _create(cli, full_size, name).err.splitlines()[-1]
    assert message in last
    assert str(full_size) in last
    assert "--model" in last


@pytest.mark.parametrize(
    ("name", "size", "arguments"),
    [
        ("swin_tiny_sugar_nelu", 64, {"img_size": 64, "drop_path_rate": 0.2}),
        ("conv2next_sugar", 32, {"drop_path_rate": 0.1, "ls_init_value": 1.0}),
        ("resnet18_sugar_bsilu", 32, {"zero_init_last": False}),
    ],
)
def test_a_folder_loads_into_its_entrypoint_without_arguments(tmp_path, monkeypatch, name, size, arguments):
    model = build(name, num_classes=3, **arguments).eval()
    data_config = DATA_CONFIG | {"input_size": (3, size, size)}
    write_model_folder(tmp_path / f"{name}.small", model, name, ("ant", "bee", "cat"), data_config, RUN)
    monkeypatch.setenv("TIMM_SUGAR_HUB", str(tmp_path))
    loaded = timm.create_model(name, pretrained=True).eval()
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert Activation.of(loaded) == Activation.of(model)
    other = timm.create_model(name, pretrained=True, num_classes=5)
    stem = next(iter(model.state_dict()))
    assert torch.equal(other.state_dict()[stem], model.state_dict()[stem])
    assert other.eval()(images).shape == (1, 5)


def test_neither_folder_nor_organisation(cli):
    last = _create(cli, "/no/such/folder", "resnet18_sugar_bsilu").err.splitlines()[-1]
    assert "TIMM_SUGAR_HUB=/no/such/folder is neither" in last


def test_weights_of_other_arguments_are_not_those_of_the_name(cli, run_folder, tmp_path):
    (tmp_path / "resnet18_sugar_bsilu.narrow").symlink_to(run_folder / "model")
    last = _create(cli, tmp_path, "resnet18_sugar_bsilu").err.splitlines()[-1]
    assert "is a resnet18_sugar_bsilu with channels=[16, 16, 16, 16]" in last


def _put(hub, repo_id, folder):
    hub.create(repo_id)
    hub.add_commit(repo_id, "main", {path.name: path.read_bytes() for path in folder.iterdir()}, "published")


def test_an_organisation_and_then_its_cache(hub, cli, full_size, environment):
    for tag in ("first", "second"):
        _put(hub, f"mine/resnet18_sugar_bsilu.{tag}", full_size / f"resnet18_sugar_bsilu.{tag}")
    result = _create(cli, "mine", "resnet18_sugar_bsilu.second")
    assert result.status == 0, result.err
    assert json.loads(result.out) == [3, "nelu", 0.1, ["ant", "bee", "cat"]]
    last = _create(cli, "mine", "resnet18_sugar_bsilu").err.splitlines()[-1]
    assert "the organisation mine on the Hub" in last
    assert "resnet18_sugar_bsilu.first, resnet18_sugar_bsilu.second" in last

    before = len(hub.requests)
    script = CREATE.format(name="resnet18_sugar_bsilu", more="")  # one tag alone is in the cache
    script += "try: timm.create_model('vgg16_sugar_bsilu', pretrained=True)\nexcept RuntimeError as error: print(error)"
    done = _python(script, environment | {"HF_HUB_OFFLINE": "1", "TIMM_SUGAR_HUB": "mine"}, full_size)
    described, error = done.splitlines()
    assert json.loads(described)[1:3] == ["nelu", 0.1]
    assert "cannot be reached, so that the cache was looked into; it has none of vgg16_sugar_bsilu" in error
    assert len(hub.requests) == before


def test_a_wrong_token_is_not_taken_for_missing_weights(hub, cli, full_size):
    folder = full_size / "resnet18_sugar_bsilu.first"
    _put(hub, f"guarded/{folder.name}", folder)
    last = _create(cli, "guarded", folder.name, HF_TOKEN="hf_wrong").err.splitlines()[-1]
    assert "does not accept the token; check HF_TOKEN" in last
    result = cli("models", TIMM_SUGAR_HUB="guarded", HF_TOKEN="hf_wrong")
    assert (result.status, len(result.err.splitlines())) == (1, 1)


def test_corrupted_weights_are_not_loaded(hub, cli, full_size):
    folder = full_size / "resnet18_sugar_bsilu.first"
    _put(hub, f"broken/{folder.name}", folder)
    hub.fail("GET", "/lfs/", "corrupt")
    last = _create(cli, "broken", folder.name).err.splitlines()[-1]
    assert "model.safetensors is corrupted" in last


def test_stock_timm_does_not_fall_back_to_pickled_weights(hub, cli, full_size):
    folder = full_size / "resnet18_sugar_bsilu.first"
    hub.create("lab/pickled")
    config = (folder / "config.json").read_bytes()
    hub.add_commit("lab/pickled", "main", {"config.json": config, "pytorch_model.bin": b"pickle"}, "")
    for package in ("timm", "timm_sugar"):
        result = cli.python(f"import {package}\n{package}.create_model('hf-hub:lab/pickled', pretrained=True)")
        assert result.status == 1
        assert "model.safetensors" in result.err
    assert hub.count("GET", "bin") + hub.count("HEAD", "bin") == 0


def test_metadata_passes_huggingface_hubs_validation(run_folder):
    card = ModelCard.load(run_folder / "model/README.md")
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    (result,) = card.data.eval_results
    assert result.dataset_args == {"split_seed": 0}
