"""Conversion: what is reached, what is left alone, what is reported, and that models come back as they were saved."""

import copy
import importlib.util
import json
import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from timm_sugar import Sugar, convert, create_model, sugar, to_relu
from timm_sugar.convert import SugarReport
from timm_sugar.hub.reload import check_reload

not_recorded = pytest.mark.filterwarnings("ignore:the conversion is not part of what a saved model records")


class Net(nn.Module):
    """One activation of each form that convert knows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)
        self.function = F.gelu
        self.partial = partial(F.gelu, approximate="tanh")
        self.block = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Sigmoid())
        self.prelu = nn.PReLU()

    def forward(self, x):
        x = self.relu(self.first(x))
        x = self.partial(self.function(self.second(x)))
        return self.prelu(self.block(x))


class CallsInForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, x):
        return self.tail(self.act(self.conv(x)).relu_())

    def tail(self, x):
        return helper(F.leaky_relu(x)) + torch.relu(x)


def helper(x):
    return F.silu(x)


class SEModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2, self.gate = nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1), nn.Sigmoid()

    def forward(self, x):
        return x * self.gate(self.fc2(self.act(self.fc1(F.relu(x.mean((2, 3), keepdim=True))))))


def sugars(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, Sugar)}


@pytest.mark.parametrize(("save", "ratio"), [("exact", 1), ("uint8", 4), ("uint4", 8)])
def test_save_mode_is_that_of_what_is_kept(save, ratio):
    model = convert(nn.Sequential(nn.Linear(64, 32), nn.GELU()), save=save)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        model(torch.randn(8, 64))
    assert model[1].save == save
    assert 4 * 8 * 32 / ratio in kept


def test_reaches_modules_and_attributes_that_hold_functions():
    model = Net()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert convert(model, "nelu", alpha=0.2) is model
    assert sugars(model).keys() == {"relu", "function", "partial", "block.1"}
    assert {(m.surrogate, m.alpha) for m in sugars(model).values()} == {("nelu", 0.2)}
    assert model.relu.inplace
    assert isinstance(model.block[2], nn.Sigmoid)
    assert isinstance(model.prelu, nn.PReLU)
    assert model.state_dict().keys() == state.keys()
    report = model.sugar_report
    assert report.converted == {"relu": "ReLU", "function": "gelu", "partial": "gelu", "block.1": "SiLU"}
    assert (report.surrogate, report.alpha, report.save, report.recorded) == ("nelu", 0.2, "exact", None)
    assert "block.1: SiLU" in str(report)


def test_forward_is_relu_and_backward_the_surrogate():
    model = convert(nn.Sequential(nn.GELU()), "bsilu")
    x = torch.linspace(-3, 3, 7, requires_grad=True)
    y = model(x)
    torch.testing.assert_close(y, torch.relu(x), rtol=0, atol=0)
    (expected,) = torch.autograd.grad(sugar(x, "bsilu").sum(), x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Mish(), nn.ELU(), nn.CELU(), nn.SELU(), nn.LeakyReLU(0.2)]
    + [timm.layers.create_act_layer(n) for n in ("gelu", "gelu_tanh", "quick_gelu", "hard_mish", "bsilu", "sugar_elu")]
    + [timm.layers.activations.Swish(), timm.layers.activations.Mish(), timm.layers.activations_me.SwishMe()],
    ids=lambda m: type(m).__module__.split(".")[0] + "." + type(m).__name__,
)
def test_each_activation_class(activation):
    model = convert(nn.Sequential(activation), "silu")
    assert isinstance(model[0], Sugar)
    assert model[0].surrogate == "silu"


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Tanh(), nn.Hardsigmoid(), nn.PReLU(), nn.Softmax(-1)])
def test_what_is_no_relu_like_activation_stays(activation):
    model = nn.Sequential(activation, nn.ReLU())
    assert convert(model)[0] is activation


def test_relu6_and_hard_swish_are_opt_in():
    model = nn.Sequential(nn.ReLU6(), nn.Hardswish(), nn.ReLU(), nn.GELU())
    assert list(sugars(convert(copy.deepcopy(model)))) == ["2", "3"]
    assert list(sugars(convert(copy.deepcopy(model), replace=["relu6", "relu"]))) == ["0", "2"]
    assert list(sugars(convert(copy.deepcopy(model), replace="hard_swish"))) == ["1"]
    assert list(sugars(convert(copy.deepcopy(model), replace=nn.GELU))) == ["3"]
    assert list(sugars(convert(copy.deepcopy(model), replace=(nn.Hardswish, "gelu")))) == ["1", "3"]


def test_include_and_exclude_patterns():
    model = torchvision.models.resnet18()
    convert(model, include="layer1.*", exclude=["*.1.relu"])
    assert list(sugars(model)) == ["layer1.0.relu"]
    assert isinstance(model.layer1[1].relu, nn.ReLU)


def test_state_that_is_kept():
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Linear(2, 2), shared, nn.GELU())
    calls = []
    handle = model[3].register_forward_hook(lambda *_: calls.append(1))
    model.train()
    model[3].eval()
    convert(model)
    assert model[0] is model[2]
    assert model[0].training
    assert not model[3].training
    model(torch.ones(1, 2))
    assert calls == [1]
    handle.remove()
    model(torch.ones(1, 2))
    assert calls == [1]


def test_converting_again_changes_the_surrogate():
    model = convert(nn.Sequential(nn.ReLU()), "bsilu")
    convert(model, "nelu", 0.3)
    assert (model[0].surrogate, model[0].alpha) == ("nelu", 0.3)
    assert model.sugar_report.converted == {"0": "Sugar"}


def test_gates_are_left_alone():
    model = nn.Sequential(nn.ReLU(), SEModule())
    convert(model)
    assert list(sugars(model)) == ["0"]
    assert model.sugar_report.gates == {"1.act": "ReLU"}
    assert not model.sugar_report.unreached
    assert list(sugars(convert(SEModule(), include="act"))) == ["act"]  # asked for itself, it is no part of a network


@not_recorded
@pytest.mark.parametrize(
    ("name", "gates"),
    [
        ("mobilenetv3_small_050", 9),
        ("test_efficientnet", 2),
        ("regnety_002", 13),
        ("gcvit_xxtiny", 11),
        ("vit_tiny_patch16_224", 0),
    ],
)
def test_gates_of_timm(name, gates):
    model = convert(timm.create_model(name, device="meta"))
    assert len(model.sugar_report.gates) == gates
    assert all(".se." in n or "gate" in n for n in model.sugar_report.gates)


def test_what_a_forward_calls_is_named_in_the_warning_and_stays():
    model = nn.Sequential(CallsInForward(), CallsInForward())
    message = r"leaky_relu, relu.*, silu in the forward of CallsInForward \(2 times, first in '0'\)"
    with pytest.warns(UserWarning, match=message):
        convert(model)
    assert model.sugar_report.unreached.keys() == {"0", "1"}
    assert list(sugars(model)) == ["0.act", "1.act"]


def test_nothing_is_said_of_what_was_not_asked_for():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(nn.Sequential(CallsInForward(), nn.GELU()), replace="gelu")
        convert(nn.Sequential(CallsInForward(), nn.GELU()), exclude="0*")


def test_transformer_encoder_layer_leaves_its_fast_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    relu = copy.deepcopy(encoder)
    for module in relu.layers:
        module.activation, module.activation_relu_or_gelu = F.relu, 0
    relu.use_nested_tensor = False
    convert(encoder)
    assert len(sugars(encoder)) == 2
    with torch.no_grad():
        for mask in (None, padding):
            expected = relu(x, src_key_padding_mask=mask)
            torch.testing.assert_close(encoder(x, src_key_padding_mask=mask), expected, rtol=0, atol=0)
            torch.testing.assert_close(
                to_relu(copy.deepcopy(encoder))(x, src_key_padding_mask=mask), expected, rtol=0, atol=0
            )


def test_function_that_timm_calls_with_inplace():
    model = nn.Sequential(timm.models.nfnet.GammaAct("gelu", gamma=1.5))
    convert(model, "nelu")
    assert model.sugar_report.converted == {"0.act_fn": "gelu"}
    x = torch.linspace(-2, 2, 5)
    torch.testing.assert_close(model(x), 1.5 * torch.relu(x), rtol=0, atol=0)
    to_relu(model)
    assert model[0].act_fn is F.relu
    torch.testing.assert_close(model(x), 1.5 * torch.relu(x), rtol=0, atol=0)


def test_function_that_timm_itself_takes_by_name():
    model = nn.Sequential(nn.Identity())
    model.act = timm.layers.get_act_fn("sugar_nelu")
    to_relu(model)
    assert model.act is F.relu


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        (nn.Linear(2, 2), {}, "nothing to replace by SUGAR in Linear: it has no activation"),
        (nn.Sequential(nn.ReLU6()), {}, "left as they are ReLU6"),
        (nn.Sequential(nn.ReLU()), {"include": "nothing*"}, "left as they are ReLU"),
        (torchvision.models.GoogLeNet(init_weights=False), {}, "out of reach are relu in the forward of BasicConv2d"),
        (nn.Sequential(nn.ReLU()), {"surrogate": "bsyliu"}, "did you mean 'bsilu'"),
        (nn.Sequential(nn.ReLU()), {"replace": "rellu"}, "unknown activation to replace 'rellu'; did you mean 'relu'"),
        (nn.Sequential(nn.ReLU()), {"surrogate": "mish", "alpha": 1.0}, "has no alpha"),
        (nn.Sequential(nn.ReLU()), {"save": "exakt"}, "did you mean 'exact'"),
    ],
)
def test_errors_are_one_line_and_change_nothing(model, kwargs, message):
    with pytest.raises(ValueError, match=message) as e:
        convert(model, **kwargs)
    assert "\n" not in str(e.value)
    assert not sugars(model)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_vit", {}),
        ("test_resnet", dict(num_classes=3)),
        ("vgg11", dict(num_classes=3, mlp_ratio=1 / 64)),
        ("resnet18_sugar_bsilu", dict(num_classes=3)),
        ("conv2next_tiny", dict(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))),
        ("swin_tiny_sugar_nelu", dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))),
    ],
)
@pytest.mark.parametrize("alpha", [None, 0.4])
def test_models_saved_by_timm_come_back_as_they_are(name, kwargs, alpha, tmp_path):
    model = convert(timm.create_model(name, **kwargs), "nelu", alpha, save="uint8").eval()
    assert model.sugar_report.recorded
    x = torch.randn(1, *model.default_cfg["input_size"])
    with torch.no_grad():
        expected = model(x)

    def save(place):
        timm.models.save_for_hf(model, tmp_path / place, safe_serialization=True)
        check_reload(tmp_path / place, model)  # stock timm has no SUGAR, but the same logits
        again = create_model(f"local-dir:{tmp_path / place}", pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(again(x), expected)
        assert sugars(again).keys() == sugars(model).keys()
        return {(m.surrogate, m.alpha, m.save) for m in sugars(again).values()}

    assert save("sugar") == {("nelu", alpha or 0.01, "uint8")}
    for activation in sugars(model).values():
        activation.alpha = 0.7  # as a schedule does
    assert save("changed") == {("nelu", 0.7, "uint8")}
    to_relu(model)
    assert save("relu") == set()


def test_a_registered_model_whose_alpha_changed_comes_back_with_it(tmp_path):
    model = timm.create_model("resnet18_sugar_bsilu", num_classes=3)
    for alpha, recorded in ((1.67, {}), (0.5, {"surrogate": "bsilu", "alpha": 0.5}), (1.67, {})):
        for activation in sugars(model).values():
            activation.alpha = alpha
        timm.models.save_for_hf(model, tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert {k: v for k, v in config["model_args"].items() if k in ("surrogate", "alpha")} == recorded
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
        assert {m.alpha for m in sugars(again).values()} == {alpha}
    model.layer1[0].act1.alpha = 0.1
    with pytest.warns(UserWarning, match="the surrogates of this network differ"):
        model.state_dict()


def test_stock_timm_refuses_what_it_cannot_build(tmp_path):
    """timm's Swin takes no activation: it would load the weights under GELU."""
    small = dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), num_classes=3)
    model = convert(timm.create_model("swin_tiny_patch4_window7_224", **small), "nelu", 0.2).eval()
    assert model.sugar_report.recorded
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    with pytest.raises(TypeError, match="surrogate"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    again = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert {(m.surrogate, m.alpha) for m in sugars(again).values()} == {("nelu", 0.2)}
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    with pytest.warns(UserWarning, match="a reload does not give ReLU"):
        to_relu(model)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    with pytest.raises(TypeError, match="surrogate"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_conversion_of_a_part_says_that_it_is_not_recorded():
    with pytest.warns(UserWarning, match="convert it again; to share the network, apply to_relu"):
        model = convert(timm.create_model("test_vit"), include="blocks.0*")
    assert model.sugar_report.recorded is False


def test_a_pickled_model_comes_back_converted(tmp_path):
    model = convert(Net(), "elu").eval()
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert sugars(again).keys() == sugars(model).keys()
    assert isinstance(again.sugar_report, SugarReport)
    x = torch.randn(2, 4)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_to_relu_on_all_forms():
    model = convert(Net(), "nelu").eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(5, 4)
    expected = model(x)
    assert to_relu(model) is model
    assert not sugars(model)
    assert isinstance(model.relu, nn.ReLU)
    assert model.relu.inplace
    assert model.function is F.relu
    assert not hasattr(model, "sugar_report")
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    torch.testing.assert_close(to_relu(model)(x), expected, rtol=0, atol=0)  # nothing left to do


@not_recorded
@pytest.mark.parametrize(
    ("library", "name"),
    [(torchvision.models.get_model, name) for name in ("resnet18", "mobilenet_v3_small", "squeezenet1_1")]
    + [(timm.create_model, name) for name in ("test_vit", "test_convnext", "test_byobnet")],
)
def test_models_of_libraries_train_and_deploy(library, name):
    torch.manual_seed(0)
    model = convert(library(name, num_classes=4), "nelu")
    x = torch.randn(2, *getattr(model, "default_cfg", {"input_size": (3, 64, 64)})["input_size"])
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(to_relu(model)(x), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_published_table_is_what_convert_reaches():
    path = Path(__file__).parent.parent / "benchmarks" / "convert_reach.py"
    spec = importlib.util.spec_from_file_location("convert_reach", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = list(script.rows())
    families = [r.family for r in rows if r.family not in ("torchvision", "transformers")]
    assert set(timm.list_modules()) - {"conv2next"} <= set(families)
    for row in rows:
        assert row.converted or row.left.startswith(("left as they are ReLU6", "out of reach")), row
    written, now = (
        re.sub(r"\d+\.\d+\.\d+", "", page) for page in (script.PAGE.read_text("utf-8"), script.render(rows))
    )
    assert written == now  # but for the versions that the page names
