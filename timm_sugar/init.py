"""Initialisations that replace a network's own: randomised asymmetric, and PyTorch's default.

Randomised asymmetric initialisation makes it unlikely that a ReLU network is born dead. Source: Lu, Shin, Su,
Karniadakis, "Dying ReLU and Initialization: Theory and Numerical Examples", Communications in Computational Physics
28(5), 2020, arXiv:1903.06733.
"""

import math
from typing import TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_STD = 0.6007  # preserves the norm of the signal across layers, given the Beta(2, 1) entry
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def randomized_asymmetric_(module: ModuleT, generator: torch.Generator | None = None) -> ModuleT:
    """Initialise every linear and convolutional layer of a module in place (RAI, Lu et al. 2020).

    For each output neuron or channel, the row (W, b) of fan_in + 1 numbers is drawn from a normal distribution with
    standard deviation ``0.6007 / sqrt(fan_in)``; then one entry, chosen uniformly, is replaced by a draw from
    Beta(2, 1). In a layer without bias the row is W.

    Args:
        module: An `nn.Linear`, `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, or a module that contains some. All other
            parameters (of norms and transposed convolutions, for example) keep their values.
        generator: Random generator on the device of the parameters; None takes torch's default generator.

    Returns:
        The module itself.

    Raises:
        ValueError: there is no such layer in the module.

    Examples:
        >>> layer = randomized_asymmetric_(nn.Linear(2, 8))  # weight (8, 2), bias (8,)
    """
    layers = [m for m in module.modules() if isinstance(m, _LAYERS)]
    if not layers:
        raise ValueError(f"{type(module).__name__} has no linear or convolutional layer to initialise")
    for layer in layers:
        weight, bias = layer.weight, layer.bias
        neurons, fan_in = weight.shape[0], weight[0].numel()
        rows = weight.new_empty(neurons, fan_in + (bias is not None))
        rows.normal_(std=_STD / math.sqrt(fan_in), generator=generator)
        place = torch.randint(rows.shape[1], (neurons, 1), device=rows.device, generator=generator)
        beta = rows.new_empty(neurons, 1).uniform_(generator=generator).sqrt_()  # the inverse CDF of Beta(2, 1)
        rows.scatter_(1, place, beta)
        weight.copy_(rows[:, :fan_in].reshape(weight.shape))
        if bias is not None:
            bias.copy_(rows[:, fan_in])
    return module


def pytorch_default_(module: ModuleT) -> ModuleT:
    """Re-initialise every linear and convolutional layer of a module in place, as `torch.nn` does by default.

    Weights and biases are uniform with variance ``1 / (3 * fan_in)``. In a convolution with as many output as input
    channels this is a sixth of the variance of timm's kaiming_normal over fan_out. Other parameters keep their values.

    Args:
        module: As for `randomized_asymmetric_`. Random numbers come from torch's default generator.

    Returns:
        The module itself.

    Raises:
        ValueError: there is no such layer in the module.

    Examples:
        >>> layer = pytorch_default_(nn.Conv2d(16, 32, 3))  # |weight| is at most 1 / 12
    """
    layers = [m for m in module.modules() if isinstance(m, _LAYERS)]
    if not layers:
        raise ValueError(f"{type(module).__name__} has no linear or convolutional layer to initialise")
    for layer in layers:
        layer.reset_parameters()
    return module
