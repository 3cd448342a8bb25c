"""Cheaper exponentials and bounds for float32 kernels on the CPU, where arithmetic and not memory is what costs.

On large tensors a pass that computes an exponential in the usual way is bound by its instructions, not by memory. An
exponential of a known error (below) takes fewer of them, and so does a clamp that does not treat NaN as a case of its
own. Bodies of kernels are rewritten when they are compiled: surrogates, a user's own included, are written as ever.
"""

from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_LOG2_E = 1.4426950408889634
# 2^f for -0.5 <= f <= 0.5, exact at 0: the polynomial of degree 5 with the least largest relative error, 9.2e-8
_POWERS_OF_2 = (1.0, 0.6931469776, 0.2402224209, 0.0555073368, 0.0096715125, 0.0013264750)
_LEAST, _MOST = -1024.0, 88.0  # of what `_exp_within` takes


class Cheaper(fx.Interpreter):
    """Runs a traced kernel with cheaper forms of some float32 operations; trace that to get the cheaper kernel.

    The exponential has a relative error below 7e-7 for arguments from -10 to 10, growing with their size, gives 0
    below -87.7, and inf above 88.7 as ever. NaN stays NaN everywhere.
    """

    def run_node(self, n: fx.Node) -> Any:
        value = n.meta.get("val")
        if n.op == "call_function" and isinstance(value, Tensor) and value.dtype == torch.float32:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if n.target is _aten.clamp.default and not kwargs:
                return _clamp(*args)
            if n.target is _aten.exp.default:
                return _exp_within(args[0]) if _is_within(n.args[0]) else _exp(args[0])
            if n.target is _aten.sigmoid.default:
                return 1 / (1 + _exp(-args[0]))
        return super().run_node(n)


def _is_within(argument: Any) -> bool:
    """Whether a node is the result of a clamp that leaves nothing outside what `_exp_within` takes."""
    if not isinstance(argument, fx.Node) or argument.target is not _aten.clamp.default or len(argument.args) != 3:
        return False
    low, high = argument.args[1:]
    return isinstance(low, (int, float)) and isinstance(high, (int, float)) and low >= _LEAST and high <= _MOST


def _clamp(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    if low is not None:
        x = torch.where(x < low, low, x)
    return x if high is None else torch.where(x > high, high, x)


def _exp(x: Tensor) -> Tensor:
    return torch.where(x > _MOST, torch.inf, _exp_within(_clamp(x, _LEAST, _MOST)))


def _exp_within(x: Tensor) -> Tensor:
    turns = x * _LOG2_E
    whole = torch.round(turns)
    part = turns - whole
    square = part * part
    c0, c1, c2, c3, c4, c5 = _POWERS_OF_2
    # In pairs: a chain of six operations, each waiting for the one before, would take longer.
    power = (c0 + c1 * part) + square * ((c2 + c3 * part) + square * (c4 + c5 * part))
    # 2^whole by its bits: the exponent field holds whole + 127, and 0 stands for 0
    bits = torch.relu(whole * 2.0**23 + 127 * 2.0**23)
    return power * bits.to(torch.int32).view(torch.float32)
