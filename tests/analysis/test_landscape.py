"""Landscapes and sharpness: exact on small networks, the same for SUGAR and ReLU, and resumed where they stopped."""

import json
import math
import shutil

import pytest
import torch
from torch import Tensor, nn

from timm_sugar import Sugar, to_relu
from timm_sugar.analysis import landscape as module
from timm_sugar.analysis import loss_landscape, random_directions, sharpness
from timm_sugar.cli import main


class Squares(nn.Module):
    """Logits that are linear in the squares of the weights: where these are small, the loss is sharply concave."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.square().t()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def convnet(activation: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(36 * 4, 3)]
    network = nn.Sequential(*layers)
    network[1].running_var.fill_(2.0)
    network[1].weight.data.uniform_(0.5, 1.5)
    return network


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    images, labels = torch.randn(10, 3, 8, 8), torch.randint(3, (10,))
    return list(zip(images.split(4), labels.split(4), strict=True))


def exact_eigenvalues(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Eigenvalues of the Hessian of the loss, ascending, from the whole matrix."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, (x,)), labels)

    return torch.linalg.eigvalsh(torch.func.hessian(loss)(flat))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # of torch.func.hessian itself
@pytest.mark.parametrize("build", [mlp, Squares])
def test_sharpness_is_the_exact_largest_eigenvalue(build):
    """Of the perceptron the largest eigenvalue is that of largest magnitude; of the squares it is not."""
    torch.manual_seed(0)
    model = build().double()
    x, labels = torch.rand(12, 4).double(), torch.zeros(12, dtype=torch.long)
    found = sharpness(model, [(x[:5], labels[:5]), (x[5:], labels[5:])], tolerance=1e-4, max_iterations=3000)
    exact = exact_eigenvalues(model, x, labels)
    assert found.converged
    assert found.residual <= 1e-4 * found.largest
    assert found.largest == pytest.approx(exact[-1].item(), rel=1e-3)
    assert found.largest_magnitude == pytest.approx(exact[exact.abs().argmax()].item(), rel=1e-3)
    assert (found.largest_magnitude < 0) == (build is Squares)
    assert (exact - found.largest).abs().min() <= found.residual


def test_sharpness_says_when_it_has_not_converged(batches):
    with pytest.raises(ValueError, match="max_iterations must be at least 1, got 0"):
        sharpness(convnet(nn.ReLU), batches, max_iterations=0)
    found = sharpness(convnet(nn.ReLU), batches, tolerance=1e-9, max_iterations=2)
    assert not found.converged
    assert found.iterations == 2
    assert found.residual > 1e-9 * found.largest


def test_sugar_and_relu_are_the_same_and_stay_as_they_were(batches, tmp_path):
    """Both are measured in eval mode; the model itself keeps its activations, weights and mode."""
    sugar = convnet(Sugar).train()
    before = {name: tensor.clone() for name, tensor in sugar.state_dict().items()}
    relu = to_relu(convnet(Sugar))
    assert sharpness(sugar, batches) == sharpness(relu, batches)
    found = [loss_landscape(m, batches, tmp_path / f"{i}.json", 3) for i, m in enumerate((sugar, relu))]
    for landscape in found:
        landscape.pop("seconds")
    assert found[0] == found[1]
    assert sugar.training
    assert isinstance(sugar[2], Sugar)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sugar.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in sugar.parameters())


def test_directions_have_the_norm_of_each_filter_and_are_shared():
    model, other = convnet(nn.ReLU), convnet(nn.ReLU)
    other[0].weight.data.mul_(3.0)
    first, second = random_directions(model)
    assert set(first) == {"0.weight", "5.weight"}  # neither biases nor BatchNorm
    for name, direction in first.items():
        weight = dict(model.named_parameters())[name]
        assert torch.allclose(direction.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))
    assert abs(torch.cosine_similarity(first["5.weight"].flatten(), second["5.weight"].flatten(), 0)) < 0.3
    assert torch.allclose(random_directions(other)[0]["0.weight"], 3 * first["0.weight"])
    assert not torch.equal(random_directions(model, seed=1)[0]["0.weight"], first["0.weight"])


def test_points_are_the_loss_of_the_moved_weights(batches, tmp_path):
    model = convnet(nn.ReLU).eval()
    found = loss_landscape(model, batches, tmp_path / "landscape.json", 3)
    assert found == json.loads((tmp_path / "landscape.json").read_text())
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    first, second = random_directions(model)
    for row, column in ((1, 1), (0, 2)):
        moved = {
            name: p + found["axis"][column] * first[name] + found["axis"][row] * second[name] if name in first else p
            for name, p in model.named_parameters()
        }
        logits = torch.func.functional_call(model, moved, (images,))
        assert found["loss"][row][column] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
        assert found["top1"][row][column] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert found["axis"] == [-0.25, 0.0, 0.25]


def test_goes_on_where_it_was_stopped(batches, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_WRITES", 0.0)
    model = convnet(nn.ReLU)
    whole = loss_landscape(model, batches, tmp_path / "whole.json", 5)

    def stop(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    path = tmp_path / "stopped.json"
    with pytest.raises(KeyboardInterrupt):
        loss_landscape(model, batches, path, 5, on_point=stop)
    assert json.loads(path.read_text())["done"] == 7
    points = []
    resumed = loss_landscape(model, batches, path, 5, on_point=lambda done, total: points.append((done, total)))
    assert points == [(done, 25) for done in range(8, 26)]
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    assert loss_landscape(model, batches, path, 5, on_point=stop, on_iteration=stop) == resumed


def test_refuses_what_it_was_not_begun_with(batches, tmp_path):
    path = tmp_path / "landscape.json"
    model = convnet(nn.ReLU)
    loss_landscape(model, batches, path, 3)
    with pytest.raises(ValueError, match="resolution 3, not 5"):
        loss_landscape(model, batches, path, 5)
    with pytest.raises(ValueError, match="seed 0, not 1"):
        loss_landscape(model, batches, path, 3, seed=1)
    with pytest.raises(ValueError, match="images 10, not 8"):
        loss_landscape(model, batches[:2], path, 3)
    model[0].bias.data.add_(1.0)
    with pytest.raises(ValueError, match="weights"):
        loss_landscape(model, batches, path, 3)
    path.write_text("{")
    with pytest.raises(ValueError, match="is no landscape"):
        loss_landscape(model, batches, path, 3)
    with pytest.raises(ValueError, match="odd number"):
        loss_landscape(model, batches, tmp_path / "other.json", 4)
    for useless, message in ((iter(batches), "many times"), ([], "no images")):
        with pytest.raises(ValueError, match=message):
            sharpness(model, useless)


class Cliff(nn.Module):
    """A linear classifier whose logits are infinite where its weights add up to more than at the start."""

    def __init__(self, batches):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(batches[0][0][0].numel(), 10)
        self.sum = self.linear.weight.sum().item()

    def forward(self, inputs):
        return self.linear(inputs.flatten(1)) + (math.inf if self.linear.weight.sum() > self.sum + 1e-4 else 0.0)


def test_what_is_not_finite_and_what_has_no_hessian(batches, tmp_path):
    """A loss that overflows is null, but not in the middle; a gate without a second derivative has no sharpness."""
    model = convnet(nn.Hardsigmoid)
    found = loss_landscape(model, batches, tmp_path / "gate.json", 3)
    assert "hardsigmoid_backward is not implemented" in found["sharpness"]["missing"]
    model[5].weight.data.fill_(3e38)
    with pytest.raises(ValueError, match="loss of this model is not finite"):
        loss_landscape(model, batches, tmp_path / "overflow.json", 3)
    assert not (tmp_path / "overflow.json").exists()
    found = loss_landscape(Cliff(batches), batches, tmp_path / "cliff.json", 3)
    losses = [loss for row in found["loss"] for loss in row]
    assert losses[4] is not None
    assert losses.count(None) == 4  # the directions have both signs
    assert "NaN" not in (tmp_path / "cliff.json").read_text()


def test_command_line(runs, tmp_path, capsys):
    for run in runs:
        shutil.copytree(run, tmp_path / run.name)
    argv = ["landscape", str(tmp_path / "sugar"), str(tmp_path / "relu"), "--data", "digits"]
    argv += ["--resolution", "3", "--limit", "40"]
    assert main([*argv, "--output", str(tmp_path / "out"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = json.loads(out)
    assert [row["model"] for row in rows] == ["sugar", "relu"]
    assert all(row["images"] == 40 and 0 < row["centre_loss"] <= row["highest_loss"] for row in rows)
    assert {path.name for path in (tmp_path / "out/relu").iterdir()} == {"landscape.json"}
    for name in ("landscape_contours", "landscape_surface"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "out" / f"{name}.pdf").read_bytes().startswith(b"%PDF")

    assert main([*argv[:2], *argv[3:]]) == 0  # into the run's own folder
    head, line, pictures = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "model"
    assert f"{rows[0]['centre_loss']:.4g}" in line
    assert str(tmp_path / "sugar") in pictures
    assert json.loads((tmp_path / "sugar/landscape.json").read_text())["done"] == 9

    for bad, message in (
        ([*argv[:2], *argv[3:], "--seed", "1"], "seed 0, not 1"),
        ([*argv, "--limit", "0"], "limit must be at least 1"),
        (["landscape", str(tmp_path / "sugar/model"), "--data", "digits"], "--output"),
        (["landscape", str(tmp_path / "nothing"), "--data", "digits"], "there is no folder"),
    ):
        assert main(bad) == 1
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        assert message in err


def test_token_numbers_stay_integers(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3))
    batches = [(torch.randint(0, 10, (8, 3)), torch.randint(0, 3, (8,)))]
    found = loss_landscape(model, batches, tmp_path / "new" / "folder" / "landscape.json", 3)
    assert found["loss"][1][1] == pytest.approx(nn.functional.cross_entropy(model(batches[0][0]), batches[0][1]).item())
