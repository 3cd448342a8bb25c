"""Activation profiles: dead and always-active units, sparsity and activation counts by layer, and gradient norms."""

import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import called_activations, calls_summary
from ..convert import convert, to_relu
from ..layers import Sugar
from .units import LayerCounts, count_units

BINS = 50  # of the activation-count histograms


@dataclass(frozen=True)
class LayerProfile:
    """Statistics of one activation on a data set; a unit is active where its pre-activation is above 0.

    A unit is a channel of a convolution or a feature of a linear layer; an element is a unit at one position (c, h, w)
    of a feature map or one token; the paper calls it a neuron.

    Attributes:
        name: Name of the activation in the network; ``name:2`` is its second call in a forward pass.
        kind: A key of `timm_sugar.activations.KINDS`, such as "sugar" or "relu".
        units: Number of units.
        elements: Number of elements.
        dead: Units that were active nowhere.
        always_active: Units that were active everywhere: at every position of every image.
        dead_elements: Elements that were active for no image.
        sparsity: Fraction of the pre-activations that were not above 0.
        probability: For each unit, the fraction of its pre-activations that were above 0.
        histogram: Number of elements by the share of images that activate them, in `BINS` equal bins from 0 to 1;
            the paper's figures 4 and 10.
    """

    name: str
    kind: str
    units: int
    elements: int
    dead: int
    always_active: int
    dead_elements: int
    sparsity: float
    probability: list[float]
    histogram: list[int]


@dataclass(frozen=True)
class Profile:
    """Statistics of a network's activations on a data set.

    Attributes:
        images: Number of images.
        dead_units: Fraction of all units that were active nowhere.
        always_active: Fraction of all units that were active everywhere.
        dead_elements: Fraction of all elements that were active for no image.
        sparsity: Fraction of all pre-activations that were not above 0.
        layers: One record for each activation, in the order of the forward pass.
        unseen: Activation functions that a forward calls, such as ``{"layer1.0": ["relu"]}``: not counted.
    """

    images: int
    dead_units: float
    always_active: float
    dead_elements: float
    sparsity: float
    layers: list[LayerProfile]
    unseen: dict[str, list[str]]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict; probabilities have 4 significant digits."""
        return asdict(self)


def profile(model: nn.Module, batches: Iterable[Any], shared: bool = True) -> Profile:
    """Profile the activations of `model` in one pass over the data, in eval mode; its mode is restored.

    `count_units` documents which activations are counted and which dimension holds the units. Memory use does not
    depend on the number of images.

    Args:
        model: Any network, on any device.
        batches: Batches of a data loader: tensors (N, ...), tuples or lists that begin with such a tensor (labels
            after it are ignored), or mappings of keyword arguments, as for transformers' models. They are moved to
            the network's device.
        shared: In a process group, each process passes its own images, and the result covers all of them.

    Raises:
        ValueError: there are no images, or no activation was found.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> found = profile(model, [torch.randn(8, 3, 6, 6), torch.randn(2, 3, 6, 6)])
        >>> found.images, found.layers[0].units, found.layers[0].elements  # elements of (4, 4, 4)
        (10, 4, 64)
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    images = 0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), count_units(model) as counts:
            for batch in batches:
                images += _run(model, batch, device)
    finally:
        model.train(was_training)
    if shared and dist.is_initialized():
        counts.add_up_processes(device)
        total = torch.tensor(images, device=device)
        dist.all_reduce(total)
        images = int(total)
    unseen = called_activations(model)
    if not images:
        raise ValueError("there are no images to profile the network on")
    if not counts.layers:
        why = f"; out of reach are {calls_summary(model, unseen)}" if unseen else ""
        raise ValueError(f"{type(model).__name__} has no activation module or attribute to profile{why}")
    if unseen:
        warnings.warn(f"the profile leaves out {calls_summary(model, unseen)}", stacklevel=2)
    layers = [_layer(name, layer) for name, layer in counts.layers.items()]
    always_active = sum(layer.always_active for layer in layers) / sum(layer.units for layer in layers)
    return Profile(
        images=images,
        dead_units=counts.dead_units,
        always_active=always_active,
        dead_elements=counts.dead_elements,
        sparsity=counts.sparsity,
        layers=layers,
        unseen=unseen,
    )


def gradient_norms(
    model: nn.Module, inputs: Tensor, labels: Tensor, surrogate: str = "bsilu"
) -> list[dict[str, str | float]]:
    """Return the gradient norm of each layer's weights with SUGAR and with plain ReLU, on the same weights and batch.

    The loss is the cross-entropy. Copies of the model in eval mode are used, so both have the same outputs.

    Args:
        model: Classifier with SUGAR or ReLU activations, inputs (N, ...) -> logits (N, classes).
        inputs: One batch, on the model's device.
        labels: int64, (N,).
        surrogate: Surrogate to use if the model has ReLU.

    Returns:
        For each convolution and linear layer ``{"name": "layer1.0.conv1", "sugar": 0.21, "relu": 0.17}``, L2 norms.

    Raises:
        ValueError: the model has other activations, so its ReLU version is a different function.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> [row["name"] for row in gradient_norms(model, torch.randn(8, 2), torch.zeros(8, dtype=torch.long))]
        ['0', '2']
    """
    with_sugar = deepcopy(model).eval()
    with warnings.catch_warnings():  # copies are not saved
        warnings.simplefilter("ignore")
        if not any(isinstance(module, Sugar) for module in model.modules()):
            convert(with_sugar, surrogate)
            report: Any = with_sugar.sugar_report
            changed = {was for was in report.converted.values() if was.lower() != "relu"}
            if changed:
                raise ValueError(f"with {', '.join(sorted(changed))} there is no ReLU twin to compare gradients with")
        with_relu = to_relu(deepcopy(with_sugar))
    sugar, relu = (_weight_gradients(twin, inputs, labels) for twin in (with_sugar, with_relu))
    return [{"name": name, "sugar": norm, "relu": relu[name]} for name, norm in sugar.items()]


def _weight_gradients(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, float]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))}
    weights = [layer.weight.requires_grad_() for layer in layers.values()]
    loss = F.cross_entropy(model(inputs).float(), labels)
    gradients = zip(layers, torch.autograd.grad(loss, weights, allow_unused=True), strict=True)
    return {name: gradient.norm().item() for name, gradient in gradients if gradient is not None}


def _run(model: nn.Module, batch: Any, device: torch.device) -> int:
    """Call the network with a batch and return its number of images."""
    if isinstance(batch, Mapping):
        arguments = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        model(**arguments)
        return len(next(value for value in arguments.values() if torch.is_tensor(value)))
    inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
    if len(inputs):  # a process may have no share of the last images
        model(inputs.to(device))
    return len(inputs)


def _layer(name: str, counts: LayerCounts) -> LayerProfile:
    active, units = counts.active.cpu(), counts.units.cpu()
    seen = counts.seen // len(units)  # pre-activations of each unit
    bins = (active.flatten() * BINS // counts.images).clamp(max=BINS - 1)
    return LayerProfile(
        name=name,
        kind=counts.kind,
        units=len(units),
        elements=active.numel(),
        dead=int((units == 0).sum()),
        always_active=int((units == seen).sum()),
        dead_elements=int((active == 0).sum()),
        sparsity=1 - active.sum().item() / counts.seen,
        probability=[float(f"{share:.4g}") for share in (units.double() / seen).tolist()],
        histogram=torch.bincount(bins, minlength=BINS).tolist(),
    )


def revived_units(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compare the dead units of one network before and after training, on the same data, layer by layer.

    Args:
        before: The result of `Profile.to_dict`, or the content of a profile.json.
        after: As `before`.

    Returns:
        ``{"name", "units", "dead_before", "dead_after", "revived", "died"}`` for each layer: `revived` units are dead
        only before, `died` only after training.

    Raises:
        ValueError: the layers or units of the profiles differ.
    """
    layouts = [[(layer["name"], layer["units"]) for layer in found["layers"]] for found in (before, after)]
    if layouts[0] != layouts[1]:
        raise ValueError("the two profiles are not of the same network: their layers differ")
    rows = []
    for old, new in zip(before["layers"], after["layers"], strict=True):
        pairs = [(was == 0, now == 0) for was, now in zip(old["probability"], new["probability"], strict=True)]
        row = dict(name=old["name"], units=old["units"], dead_before=old["dead"], dead_after=new["dead"])
        rows.append(row | dict(revived=pairs.count((True, False)), died=pairs.count((False, True))))
    return rows
