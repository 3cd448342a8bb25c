"""The loss around a trained network: a grid along two random directions, and the largest curvature.

Both are computed on a copy with plain ReLU, as deployed, in eval mode, so that BatchNorm keeps its statistics: the
second derivative through SUGAR's surrogate is not the Hessian of the network.
"""

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..convert import NOT_RECORDED, to_relu
from ..files import write_file
from .run import finite

Batches = Iterable[tuple[Tensor, Tensor]]
OnStep = Callable[[int, int], None]
SPAN = 0.25  # as in figure 5
_SECONDS_BETWEEN_WRITES = 1.0


@dataclass(frozen=True)
class Sharpness:
    """The largest curvature of the loss: eigenvalues of its Hessian with respect to all parameters.

    Attributes:
        largest: The algebraically largest eigenvalue: the curvature along the direction in which the loss rises most.
        largest_magnitude: The eigenvalue of largest magnitude. It equals `largest`, unless it is negative.
        residual: norm(Hv - largest * v) for the unit vector v that was found: an eigenvalue lies within this distance
            of `largest`.
        tolerance: Target for `residual`, relative to the eigenvalue.
        iterations: Number of products with the Hessian, each a pass over the data.
        converged: Whether the tolerance was reached.
    """

    largest: float
    largest_magnitude: float
    residual: float
    tolerance: float
    iterations: int
    converged: bool


def sharpness(
    model: nn.Module,
    batches: Batches,
    tolerance: float = 0.01,
    max_iterations: int = 100,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Sharpness:
    """Find the largest eigenvalue of the Hessian of the mean cross-entropy, by power iteration.

    Power iteration finds the eigenvalue of largest magnitude. If it is negative, a second power iteration, on the
    Hessian shifted by this eigenvalue, finds the largest. Memory use is that of one batch.

    Args:
        model: Classifier, inputs -> logits (N, classes); not modified. A float64 network is computed in float64,
            any other in float32.
        batches: Inputs of the model, and int64 labels (N,); iterated once per iteration.
        tolerance: Stop if the residual is at most this fraction of the eigenvalue.
        max_iterations: Limit for each of the two power iterations.
        seed: Seed of the initial vector.
        on_step: Called with the number of finished iterations and `max_iterations`.

    Raises:
        ValueError: `batches` can be iterated only once, or holds no images; `max_iterations` is less than 1.
        NotImplementedError: torch has no second derivative for an operation of the network.

    Examples:
        >>> model = nn.Linear(1, 2, bias=False).double()  # for inputs 1, the logits are the weights
        >>> _ = nn.init.zeros_(model.weight)
        >>> found = sharpness(model, [(torch.ones(4, 1).double(), torch.tensor([0, 0, 1, 1]))])
        >>> round(found.largest, 4)  # largest eigenvalue of diag(p) - p p^T with p = (1/2, 1/2)
        0.5
    """
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    network = _frozen_copy(model).requires_grad_()
    images = _count(batches)
    named = dict(network.named_parameters())
    parameters = list(named.values())
    start = [_noise(seed, "start", name, p) for name, p in named.items()]

    def product(vector: list[Tensor]) -> list[Tensor]:
        total = [torch.zeros_like(p) for p in parameters]
        for logits, labels in _forward(network, batches):
            loss = F.cross_entropy(logits, labels, reduction="sum") / images
            gradient = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
            try:
                second = torch.autograd.grad(_dot(gradient, vector), parameters, materialize_grads=True)
            except RuntimeError as error:
                if "is not implemented" not in str(error):
                    raise
                raise NotImplementedError(f"no Hessian of this network: {error}") from error
            torch._foreach_add_(total, second)
        return total

    def farthest_from(shift: float) -> tuple[float, float, int, bool]:
        """Return the eigenvalue farthest from `shift`, its residual, the number of iterations, and the convergence."""
        vector = start
        for iteration in range(1, max_iterations + 1):
            vector = list(torch._foreach_div(vector, max(_norm(vector), 1e-30)))
            image = list(torch._foreach_sub(product(vector), torch._foreach_mul(vector, shift)))
            value = _dot(image, vector).item()
            residual = _norm(torch._foreach_sub(image, torch._foreach_mul(vector, value)))
            if on_step is not None:
                on_step(iteration, max_iterations)
            converged = residual <= tolerance * abs(value + shift)
            if converged or not math.isfinite(residual):
                break
            vector = image
        return value + shift, residual, iteration, converged

    with sdpa_kernel(SDPBackend.MATH):  # fused attention kernels have no second derivative
        first, residual, iterations, converged = farthest_from(0.0)
        largest = first
        if first < 0:
            largest, residual, more, also = farthest_from(first)
            iterations, converged = iterations + more, converged and also
    return Sharpness(largest, first, residual, tolerance, iterations, converged)


def random_directions(model: nn.Module, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draw two random directions in weight space, filter-normalised (Li et al., arXiv:1712.09913).

    The paper's figure 5 rescales a direction per layer; this rescales per filter, so its pictures differ.

    Every filter of a direction (a slice along the first dimension of a parameter: the weights into one unit) has the
    norm of the model's own filter. One-dimensional parameters (biases, and the parameters of BatchNorm and other
    normalisations) have no direction and stay fixed. The directions depend only on the seed and on the names and
    shapes of the parameters, so models of the same architecture share the same directions.

    Returns:
        Two dicts: parameter name -> tensor with the shape, dtype and device of the parameter.

    Examples:
        >>> model = nn.Linear(2, 4)
        >>> (first, second) = random_directions(model, seed=0)
        >>> {name: tensor.shape for name, tensor in first.items()}
        {'weight': torch.Size([4, 2])}
    """

    def direction(axis: str) -> dict[str, Tensor]:
        found = {}
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                noise, flat = _noise(seed, axis, name, weight).flatten(1), weight.detach().flatten(1)
                scale = flat.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True).clamp_min(1e-10)
                found[name] = (noise * scale).view_as(weight)
        return found

    return direction("x"), direction("y")


def loss_landscape(
    model: nn.Module,
    batches: Batches,
    path: Path,
    resolution: int = 25,
    seed: int = 0,
    on_point: OnStep | None = None,
    on_iteration: OnStep | None = None,
) -> dict[str, Any]:
    """Measure loss and accuracy on a grid around the weights, and the sharpness at its centre.

    The file holds partial results; an interrupted computation resumes from it, with the same result.

    Args:
        model: Classifier, inputs -> logits (N, classes); not modified.
        batches: Inputs of the model, and int64 labels (N,); iterated once per point.
        path: The file, rewritten once a second. A finished one with the same settings is returned unchanged.
        resolution: Points along each of the two directions, an odd number, so that the middle one is the model.
        seed: Seed of the directions.
        on_point: Called with the number of finished points and of all points.
        on_iteration: Called with the finished and the maximum number of iterations of `sharpness`.

    Returns:
        The content of the file: `settings`; `axis`, the R steps along both directions, from -0.25 to 0.25 of the norm
        of each filter; `loss`, mean cross-entropy in nats, and `top1`, fraction of 1: R rows (second direction) of R
        columns (first direction), null where the loss is not finite; `done`, number of points; `seconds`; and
        `sharpness`, a `Sharpness`, or `missing`, the reason why there is none.

    Raises:
        ValueError: the file holds a landscape with other settings, weights or images, or no landscape; `resolution`
            is not odd; `batches` can be iterated only once, or holds no images; the model's own loss is not finite.

    Examples:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> batches = [(torch.randn(8, 2), torch.zeros(8, dtype=torch.long))]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = loss_landscape(model, batches, Path(folder, "landscape.json"), resolution=5)
        >>> len(found["loss"]), len(found["loss"][0]), found["axis"][2]  # the middle one is the model
        (5, 5, 0.0)
    """
    if resolution < 3 or resolution % 2 == 0:
        raise ValueError(f"resolution must be an odd number of at least 3, got {resolution}")
    network = _frozen_copy(model)
    images = _count(batches)
    settings = {
        "resolution": resolution,
        "span": SPAN,
        "seed": seed,
        "images": images,
        "weights": _fingerprint(network.state_dict().values()),
        "data": _fingerprint(tensor for batch in batches for tensor in batch),
    }
    state = _read(path, settings) or {
        "settings": settings,
        "axis": [round(value, 6) for value in torch.linspace(-SPAN, SPAN, resolution, dtype=torch.float64).tolist()],
        "loss": [[None] * resolution for _ in range(resolution)],
        "top1": [[None] * resolution for _ in range(resolution)],
        "done": 0,
        "seconds": 0.0,
        "sharpness": None,
    }
    if state["done"] == 0 and _evaluate(network, batches)[0] is None:
        raise ValueError("the loss of this model is not finite: there is no landscape around it")
    path.parent.mkdir(parents=True, exist_ok=True)
    began, before = time.monotonic(), state["seconds"]

    def write() -> None:
        state["seconds"] = round(before + time.monotonic() - began, 2)
        write_file(path, json.dumps(state, allow_nan=False) + "\n")

    written = began
    for row, column in _move(network, state["axis"], state["done"], seed):
        state["loss"][row][column], state["top1"][row][column] = _evaluate(network, batches)
        state["done"] += 1
        if time.monotonic() - written >= _SECONDS_BETWEEN_WRITES:
            write()
            written = time.monotonic()
        if on_point is not None:
            on_point(state["done"], resolution**2)
    if state["sharpness"] is None:
        write()
        try:
            found = asdict(sharpness(model, batches, on_step=on_iteration))
            state["sharpness"] = {k: finite(v) if isinstance(v, float) else v for k, v in found.items()}
        except NotImplementedError as error:
            state["sharpness"] = {"missing": str(error)}
        write()
    return state


def summarise_landscape(found: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers shown next to the picture of a complete landscape.

    Returns:
        `images`; `centre_loss`, the model's own; `highest_loss` on the grid, null where one is not finite; and
        `sharpness`.
    """
    losses = [loss for row in found["loss"] for loss in row]
    return {
        "images": found["settings"]["images"],
        "centre_loss": losses[len(losses) // 2],
        "highest_loss": None if None in losses else max(losses),
        "sharpness": found["sharpness"],
    }


def loss_range(landscapes: Iterable[dict[str, Any]]) -> tuple[float, float]:
    """Return the limits of a logarithmic axis, of six decades at most, for the losses of complete landscapes."""
    losses = [loss for found in landscapes for row in found["loss"] for loss in row if loss is not None]
    high = max(*losses, 1e-6)
    return min(max(min(losses), high * 1e-6), high / 1.1), high


def _move(network: nn.Module, axis: list[float], start: int, seed: int) -> Iterator[tuple[int, int]]:
    """Move the weights to each point of the grid, beginning with number `start`, and yield its row and column."""
    if start == len(axis) ** 2:
        return
    first, second = random_directions(network, seed)
    weights = [(p, p.clone(), first[name], second[name]) for name, p in network.named_parameters() if name in first]
    for point in range(start, len(axis) ** 2):
        row, column = divmod(point, len(axis))
        for parameter, centre, x, y in weights:
            parameter.copy_(centre + axis[column] * x + axis[row] * y)
        yield row, column


@torch.no_grad()
def _evaluate(network: nn.Module, batches: Batches) -> tuple[float | None, float | None]:
    """Return mean cross-entropy in nats and accuracy, both None if the loss is not finite."""
    sums = torch.zeros(3, dtype=torch.float64)
    for logits, labels in _forward(network, batches):
        loss = F.cross_entropy(logits, labels, reduction="sum").double()
        correct = (logits.argmax(1) == labels).sum().double()
        sums += torch.stack([loss, correct, loss.new_tensor(len(labels))]).cpu()
    loss, correct, images = sums.tolist()
    mean = finite(loss / images)
    return mean, None if mean is None else correct / images


def _frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy with ReLU instead of SUGAR, in eval mode, in float64 if the model is, else float32."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NOT_RECORDED)
        network = to_relu(deepcopy(getattr(model, "_orig_mod", model)))  # unwrap torch.compile
    double = any(p.dtype == torch.float64 for p in network.parameters())
    return network.eval().to(torch.float64 if double else torch.float32).requires_grad_(False)


def _forward(network: nn.Module, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    parameter = next(network.parameters())
    for inputs, labels in batches:
        inputs = inputs.to(parameter) if inputs.is_floating_point() else inputs.to(parameter.device)  # token ids
        yield network(inputs), labels.to(parameter.device)


def _count(batches: Batches) -> int:
    if iter(batches) is batches:
        raise ValueError("batches must be something to go through many times, a DataLoader or list, not an iterator")
    images = sum(len(labels) for _, labels in batches)
    if images == 0:
        raise ValueError("there are no images to measure the loss on")
    return images


def _noise(seed: int, purpose: str, name: str, like: Tensor) -> Tensor:
    """Draw a standard normal tensor that depends only on the seed, the purpose, the name and the shape."""
    key = hashlib.sha256(f"{seed} {purpose} {name} {tuple(like.shape)}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
    return torch.randn(like.shape, generator=generator).to(like)


def _dot(left: Iterable[Tensor], right: Iterable[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def _norm(tensors: Sequence[Tensor]) -> float:
    return _dot(tensors, tensors).sqrt().item()


def _fingerprint(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _read(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        before = state["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no landscape: {error}; delete it to start over") from error
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{path} holds a landscape with {name} {before.get(name)}, not {settings[name]}; "
            "give another output folder, or delete it to start over"
        )
    return state
