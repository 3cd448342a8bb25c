"""Every registered model against what timm expects of a model: the ground that timm's own tests cover, and more."""

import inspect
import math

import pytest
import timm
import torch
from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules, group_parameters, is_model
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from timm_sugar import Sugar
from timm_sugar.models._pretrained import _VARIANTS, is_own, stock_architecture

MODELS = {  # default surrogate and alpha
    "resnet18_sugar_bsilu": ("bsilu", 1.67),
    "resnet34_sugar_bsilu": ("bsilu", 1.67),
    "resnet50_sugar_bsilu": ("bsilu", 1.67),
    "resnet18_cifar_sugar_bsilu": ("bsilu", 1.67),
    "vgg16_sugar_bsilu": ("bsilu", 1.67),
    "vgg16_bn_sugar_bsilu": ("bsilu", 1.67),
    "vgg16_cifar_sugar_bsilu": ("bsilu", 1.67),
    "swin_tiny_sugar_nelu": ("nelu", 0.01),
    "swin_small_sugar_nelu": ("nelu", 0.01),
    "swin_base_sugar_nelu": ("nelu", 0.01),
    "conv2next_sugar": ("nelu", 0.1),
    "conv2next_tiny": None,
    "conv2next_base": None,
    "conv2next_large": None,
}
# Arguments that keep the structure and make it quick to compute.
VGG16 = [8, 8, "M", 8, 8, "M", *([16, 16, 16, "M"] * 3)]
SMALL = {
    "vgg": dict(mlp_ratio=1 / 512, cfg=VGG16),
    "vgg16_cifar": dict(cfg=VGG16),
    "swin": dict(embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), img_size=56, drop_path_rate=0.0),
    "conv2next": dict(depths=(1, 1, 2, 1), dims=(16, 16, 24, 24)),
    "resnet": dict(channels=(16, 16, 24, 24)),
}
all_models = pytest.mark.parametrize("name", MODELS)
# One of each class, which is what depends on the code and not on the sizes.
each_class = pytest.mark.parametrize(
    "name",
    ["resnet18_sugar_bsilu", "resnet18_cifar_sugar_bsilu", "vgg16_bn_sugar_bsilu", "vgg16_cifar_sugar_bsilu"]
    + ["swin_tiny_sugar_nelu", "conv2next_sugar"],
)
scripting = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.:FutureWarning",
    "ignore:.*torch.jit.:DeprecationWarning",
    "ignore:torch.jit.script compiles SUGAR",
)


def small_args(name):
    return SMALL[next(p for p in sorted(SMALL, key=len, reverse=True) if name.startswith(p))]


def small(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**small_args(name), **kwargs})


def images(name, batch=2):
    size = 56 if name.startswith("swin") else 32
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_registry_is_complete():
    assert {n for n in timm.list_models() if is_own(n)} == MODELS.keys()
    assert set(timm.list_models("*sugar*")) == {n for n in MODELS if "sugar" in n}


def test_models_count_under_the_module_names_of_timm():
    assert "resnet50_sugar_bsilu" in timm.list_models(module="resnet")
    assert "vgg16_bn_sugar_bsilu" in timm.list_models(module="vgg")
    assert "swin_base_sugar_nelu" in timm.list_models(module="swin_transformer")
    assert timm.list_models(module="conv2next") == sorted(n for n in MODELS if "conv2next" in n)


@all_models
def test_default_activation(name):
    model = timm.create_model(name, device="meta")
    found = {(m.surrogate, m.alpha, m.save) for m in model.modules() if isinstance(m, Sugar)}
    assert found == ({(*MODELS[name], "exact")} if MODELS[name] else set())
    plain = {type(m) for m in model.modules() if isinstance(m, (nn.ReLU, nn.GELU))}
    assert plain == (set() if MODELS[name] else {nn.GELU})


@pytest.mark.parametrize("name", timm.list_models([*MODELS], include_tags=True))
def test_a_name_builds_what_its_cfg_says(name):
    cfg, model = timm.get_pretrained_cfg(name), timm.create_model(name, device="meta")
    assert model.pretrained_cfg == cfg.to_dict()
    assert model.get_classifier().out_features == cfg.num_classes
    if cfg.fixed_input_size:
        assert model.patch_embed.img_size == cfg.input_size[1:]
    if "." not in name:  # the network by itself, whatever its weights were trained on
        assert (cfg.tag, cfg.hf_hub_id) == (None, None)


@all_models
def test_default_cfg(name):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    cfg, state = model.default_cfg, model.state_dict()
    assert f"{cfg['classifier']}.weight" in state
    assert f"{cfg['first_conv']}.weight" in state
    for key in ("mean", "std", "interpolation", "crop_pct", "license", "paper_name", "hf_hub_filename"):
        assert cfg[key], key
    x = torch.empty(2, *cfg["input_size"], device="meta")
    features = model.forward_features(x)
    spatial = features.shape[1:3] if getattr(model, "output_fmt", "NCHW") == "NHWC" else features.shape[2:]
    assert spatial == cfg["pool_size"]
    assert model(x).shape == (2, cfg["num_classes"])
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(x).shape == pre_logits.shape
    assert timm.create_model(name, num_classes=0, device="meta")(x).shape == pre_logits.shape


@all_models
def test_constructor_contract(name):
    with pytest.raises(TypeError):
        timm.create_model(name, device="meta", not_an_argument=1)
    model = timm.create_model(name, device="meta", dtype=torch.float64, in_chans=1, num_classes=7)
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert {t.dtype for t in model.parameters()} == {torch.float64}
    assert model.get_parameter(f"{model.default_cfg['first_conv']}.weight").shape[1] == 1
    assert model.get_classifier().out_features == 7
    assert inspect.signature(model.reset_classifier).parameters["global_pool"].default is None
    groups = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert len(set(groups.values())) > 1
    assert groups.keys() == {n for n, _ in model.named_parameters()}
    model.reset_classifier(3)
    head = model.get_classifier()
    assert (head.weight.device.type, head.weight.dtype, head.out_features) == ("meta", torch.float64, 3)


@all_models
@pytest.mark.parametrize("surrogate", ["bsilu", "elu"])
def test_surrogate_argument(name, surrogate):
    model = timm.create_model(name, surrogate=surrogate, device="meta")
    found = {(m.surrogate, m.alpha) for m in model.modules() if isinstance(m, Sugar)}
    assert found == {(surrogate, {"bsilu": 1.67, "elu": 1.0}[surrogate])}


@all_models
def test_alpha_and_act_layer_arguments(name):
    model = timm.create_model(name, surrogate="nelu", alpha=0.25, device="meta")
    assert {m.alpha for m in model.modules() if isinstance(m, Sugar)} == {0.25}
    silu = timm.create_model(name, act_layer="silu", device="meta")
    assert not any(isinstance(m, Sugar) for m in silu.modules())
    assert any(isinstance(m, nn.SiLU) for m in silu.modules())
    named = timm.create_model(name, act_layer="sugar_mish", device="meta")
    assert {m.surrogate for m in named.modules() if isinstance(m, Sugar)} == {"mish"}
    by_class = timm.create_model(name, act_layer=nn.LeakyReLU, device="meta")
    assert any(isinstance(m, nn.LeakyReLU) for m in by_class.modules())


@all_models
def test_contradictory_and_unknown_arguments(name):
    for kwargs, message in (
        (dict(surrogate="bsilu", act_layer="relu"), "surrogate and act_layer contradict"),
        (dict(surrogate="bsylu"), "did you mean 'bsilu'"),
        (dict(act_layer="gelo"), "did you mean 'gelu'"),
        (dict(surrogate="gelu", alpha=1.0), "has no alpha"),
        (dict(surrogate="nelu", alpha=float("nan")), "finite"),
        (dict(surrogate="nelu", save="exakt"), "did you mean 'exact'"),
    ):
        with pytest.raises(ValueError, match=message):
            timm.create_model(name, device="meta", **kwargs)


def test_alpha_without_any_surrogate():
    with pytest.raises(ValueError, match="alpha needs a surrogate"):
        timm.create_model("conv2next_base", alpha=0.1, device="meta")


def test_overriding_the_surrogate_resets_alpha():
    model = timm.create_model("conv2next_sugar", surrogate="nelu", device="meta")
    assert {m.alpha for m in model.modules() if isinstance(m, Sugar)} == {0.01}


@each_class
def test_forward_is_that_of_relu(name):
    model = small(name, num_classes=5).eval()
    relu = small(name, num_classes=5, act_layer="relu").eval()
    relu.load_state_dict(model.state_dict())
    assert any(isinstance(m, nn.ReLU) for m in relu.modules())
    x = images(name)
    torch.testing.assert_close(model(x), relu(x), rtol=0, atol=0)


@each_class
def test_backward_reaches_every_parameter_and_differs_from_relu(name):
    model = small(name, num_classes=5)
    relu = small(name, num_classes=5, act_layer="relu")
    relu.load_state_dict(model.state_dict())
    x = images(name)
    gradients = []
    for m in (model, relu):
        torch.manual_seed(2)  # drop path and dropout
        m.train()(x).square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in m.parameters())
        gradients.append(m.get_parameter(f"{m.default_cfg['first_conv']}.weight").grad)
    assert not torch.allclose(*gradients)


@each_class
def test_grad_checkpointing(name):
    model = small(name, num_classes=5).eval()
    x = images(name).requires_grad_()
    try:
        small(name).set_grad_checkpointing()
    except AssertionError:
        assert name.startswith("vgg")  # timm's VGG supports none
        return
    passes = []
    for module in model.modules():
        if isinstance(module, Sugar):
            module.register_forward_hook(lambda *_: passes.append(1))
    out = model(x)
    (expected,) = torch.autograd.grad(out.square().sum(), x)
    once = len(passes)
    model.set_grad_checkpointing()
    again = model(x)
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), x)[0], expected)
    assert once < len(passes) - once <= 2 * once  # the backward goes through the blocks once more


@all_models
def test_no_branch_starts_at_zero(name):
    """With a last normalisation of each block at zero, the paper's learning rate barely moves a network."""
    norms = [m for m in small(name).modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))]
    assert all((norm.weight == 1).all() for norm in norms)
    assert norms or name == "vgg16_sugar_bsilu"


def test_the_vgg_for_cifar_has_the_papers_layers():
    model = timm.create_model("vgg16_cifar_sugar_bsilu", device="meta")
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.MaxPool2d))]
    widths = [m.out_channels if isinstance(m, nn.Conv2d) else type(m).__name__ for m in layers]
    pool = "MaxPool2d"
    first = [64, 64, pool, 128, 128, pool, 256, 256, 256, pool]
    assert widths == [*first, 512, 512, 512, pool, 512, 512, 512, pool, "Linear"]


@each_class
def test_features_only(name):
    model = small(name, features_only=True).eval()
    x = images(name)
    axis = 3 if getattr(model, "output_fmt", "NCHW") == "NHWC" else 1
    outputs = model(x)
    assert len(outputs) == len(model.feature_info.channels()) >= 4
    for out, channels, reduction in zip(
        outputs, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert out.shape[axis] == channels
        assert out.shape[axis % 3 + 1] == math.ceil(x.shape[-1] / reduction)


@each_class
def test_forward_intermediates(name):
    model = small(name).eval()
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    x = images(name)
    output, taps = model.forward_intermediates(x)
    torch.testing.assert_close(output, model.forward_features(x))
    assert len(taps) == len(model.feature_info)
    for tap, channels, reduction in zip(taps, info.channels(), info.reduction(), strict=True):
        assert tap.shape[1] == channels
        assert tap.shape[2] == math.ceil(x.shape[-1] / reduction)
    last = model.forward_intermediates(x, indices=1, intermediates_only=True)
    torch.testing.assert_close(last, taps[-1:])
    early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, taps[1:2])


@each_class
def test_pruned_models_keep_their_features_and_use_all_parameters(name):
    x = images(name)
    with torch.no_grad():
        taps = small(name).eval().forward_intermediates(x, intermediates_only=True)
    for i, tap in enumerate(taps):
        model = small(name).eval()
        kept = model.prune_intermediate_layers([i], prune_norm=True)
        selected = model.forward_intermediates(x, indices=kept, intermediates_only=True)
        torch.testing.assert_close(selected[0], tap)
        (selected[0].sum() + model.forward_features(x).sum()).backward()
        assert all(p.grad is not None for p in model.parameters())


@each_class
@scripting
def test_torchscript(name):
    model = small(name, scriptable=True).eval()
    x = images(name)
    scripted = torch.jit.script(model)
    with torch.no_grad():
        torch.testing.assert_close(scripted(x), model(x))


@pytest.mark.filterwarnings("ignore:torch.jit.script compiles SUGAR activations as ReLU")
@each_class
@scripting
def test_fx_trace_and_its_torchscript(name):
    model = small(name, scriptable=True).eval()
    tracer = dict(
        leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True
    )
    _, nodes = get_graph_node_names(model, tracer_kwargs=tracer)
    traced = create_feature_extractor(model, return_nodes=[nodes[-1]], tracer_kwargs=tracer)
    x = images(name)
    with torch.no_grad():
        torch.testing.assert_close(next(iter(traced(x).values())), model(x))
        torch.testing.assert_close(next(iter(torch.jit.script(traced)(x).values())), model(x))


@each_class
def test_bfloat16_after_a_forward(name):
    model = small(name).eval()
    x = images(name)
    with torch.no_grad():
        model(x)
        assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@all_models
def test_stock_twins(name):
    """timm's network that an entrypoint declares has the same names, and starts from the same weights."""
    variant = _VARIANTS[name]
    assert stock_architecture(f"{name}.tag") == stock_architecture(name) == variant.stock
    assert (variant.activation and (variant.activation.surrogate, variant.activation.alpha)) in (
        MODELS[name],
        MODELS[name] and (MODELS[name][0], None),
    )
    if variant.stock is None:
        assert not is_model(name.partition("_sugar")[0]) or is_own(name.partition("_sugar")[0])
        return
    arguments = {key: value for key, value in small_args(name).items() if key != "cfg"}  # which stock VGG does not take
    torch.manual_seed(0)
    ours = timm.create_model(name, **arguments)
    torch.manual_seed(0)
    twin = timm.create_model(variant.stock, **variant.stock_args, **arguments)
    assert not is_own(variant.stock)
    assert ours.state_dict().keys() == twin.state_dict().keys()
    assert all(torch.equal(tensor, twin.state_dict()[key]) for key, tensor in ours.state_dict().items())
    with torch.no_grad():
        assert torch.equal(ours.eval()(images(name)), twin.eval()(images(name)))


def test_a_stock_architecture_is_its_own_twin():
    assert stock_architecture("convnext_tiny.in12k_ft_in1k") == "convnext_tiny"
