"""Deployment as plain ReLU: to_relu, ONNX, torch.export, TorchScript and int8 quantisation."""

import collections
import io

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

from timm_sugar import Sugar, to_relu

SWIN = dict(embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), img_size=56)
RESNET = dict(channels=(16, 16, 24, 24))
CONV2NEXT = dict(depths=(1, 1, 2, 1), dims=(16, 16, 24, 24))
VGG16 = [8, 8, "M", 8, 8, "M", *([16, 16, 16, "M"] * 3)]
MODELS = {  # every structure among the registered models, in small
    "resnet18_sugar_bsilu": RESNET,
    "resnet34_sugar_bsilu": RESNET,
    "resnet50_sugar_bsilu": {},  # whose logits would be too large for the tolerances in small
    "resnet18_cifar_sugar_bsilu": RESNET,
    "vgg16_sugar_bsilu": dict(mlp_ratio=1 / 512, cfg=VGG16),
    "vgg16_bn_sugar_bsilu": dict(mlp_ratio=1 / 512, cfg=VGG16),
    "vgg16_cifar_sugar_bsilu": dict(cfg=VGG16),
    "swin_tiny_sugar_nelu": SWIN,
    "conv2next_sugar": CONV2NEXT,
    "conv2next_tiny": dict(CONV2NEXT, surrogate="nelu"),
}
all_models = pytest.mark.parametrize("name", MODELS)
each_class = pytest.mark.parametrize(
    "name", ["resnet18_sugar_bsilu", "vgg16_cifar_sugar_bsilu", "swin_tiny_sugar_nelu", "conv2next_sugar"]
)
legacy_onnx = pytest.mark.filterwarnings(
    "ignore:You are using the legacy TorchScript-based ONNX export",
    "ignore:.*torch.jit:",
    "ignore:Converting a tensor",
    "ignore:The feature will be removed",
    "ignore::torch.jit.TracerWarning",
)


def network(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **MODELS[name])
    for module in model.modules():  # statistics away from 0 and 1
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def images(name):
    size = 56 if name.startswith("swin") else 32
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def count_sugar(model):
    return sum(isinstance(m, Sugar) for m in model.modules())


@all_models
def test_to_relu(name):
    model = network(name)
    x, state = images(name), {k: v.clone() for k, v in model.state_dict().items()}
    count = count_sugar(model)
    with torch.no_grad():
        expected = model(x)
        deployed = to_relu(model)
        assert count_sugar(deployed) == 0
        assert sum(isinstance(m, nn.ReLU) for m in deployed.modules()) == count > 0
        torch.testing.assert_close(deployed(x), expected, rtol=0, atol=0)
    assert deployed.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in deployed.state_dict().items())


@all_models
def test_torch_export(name):
    model, x = network(name), images(name)
    program = torch.export.export(model, (x,))
    targets = collections.Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")
    assert targets["aten.relu.default"] + targets["aten.relu_.default"] == count_sugar(model)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


@legacy_onnx
@all_models
def test_onnx(name):
    model = network(name)
    # ONNX has no adaptive pooling upwards, which timm's VGG does below 224 px.
    x = torch.randn(1, 3, 224, 224) if name in ("vgg16_sugar_bsilu", "vgg16_bn_sugar_bsilu") else images(name)
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False)
    graph = onnx.load_from_string(file.getvalue()).graph
    operators = collections.Counter(node.op_type for node in graph.node)
    assert operators["Relu"] == count_sugar(model)
    assert not operators.keys() & {"Erf", "Softplus", "Where", "Exp"}
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(x).numpy(), rtol=0, atol=1e-4)


@pytest.mark.slow
@each_class
def test_onnx_by_torch_export(name, tmp_path):
    model, x = network(name), images(name)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    operators = collections.Counter(node.op_type for node in onnx.load(path).graph.node)
    assert operators["Relu"] == count_sugar(model)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(x).numpy(), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.:FutureWarning", "ignore:.*torch.jit.:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.jit.script compiles SUGAR activations as ReLU")
@each_class
def test_torchscript_file(name, tmp_path):
    model, x = network(name), images(name)
    torch.jit.script(model).save(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    graph = loaded.inlined_graph
    assert len(graph.findAllNodes("aten::relu")) + len(graph.findAllNodes("aten::relu_")) == count_sugar(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.filterwarnings("ignore:The input of maxpool2d is not quantized")
def test_int8_quantisation_fuses_as_for_the_stock_network():
    def quantized(model):
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
        prepared(x)
        return convert_pt2e(prepared)

    def operators(model):
        return collections.Counter(str(n.target) for n in model.graph.nodes if n.op == "call_function")

    x = images("resnet18")
    model = network("resnet18_sugar_bsilu")
    stock = timm.create_model("resnet18", num_classes=10, **RESNET).eval()
    stock.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = model(x)
        direct = quantized(model)
        relus = [n for n in direct.graph.nodes if "relu" in str(n.target)]
        # BatchNorm is folded, and nothing is rounded between a convolution, or the sum of a block, and its ReLU.
        assert not any("batch_norm" in name for name in operators(direct))
        assert {str(n.args[0].target) for n in relus} == {"aten.conv2d.default", "aten.add_.Tensor"}
        assert len(relus) == count_sugar(model)
        torch.testing.assert_close(direct(x), logits, rtol=0.05, atol=0.05 * logits.abs().max().item())
        deployed, reference = quantized(to_relu(model)), quantized(stock)
        assert operators(deployed) == operators(reference)
        torch.testing.assert_close(deployed(x), reference(x), rtol=0, atol=0)
