"""The paper's controlled experiment on dying ReLUs (appendix A): all runs of a cell train as one batched network.

Source: Horuz et al., arXiv:2505.22074, appendix A, after Lu et al., "Dying ReLU and Initialization", arXiv:1903.06733.
"""

import json
import math
import multiprocessing
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_sugar.files import write_file
from timm_sugar.init import randomized_asymmetric_
from timm_sugar.layers import Sugar
from timm_sugar.surrogates import get_surrogate, list_surrogates, unknown_name

SAMPLES = 3000
BATCH_SIZE = 64
LEARNING_RATE = 0.005
MILESTONES = (100, 150, 200, 225)
_BATCHES = math.ceil(SAMPLES / BATCH_SIZE)
_TRACKED = 512  # samples on which the activation probability is measured after each epoch
GRID = torch.linspace(-1.5, 1.5, 121)  # the range of figure 6


@dataclass(frozen=True)
class Target:
    """A target function: (d_in, ...) to (d_out, ...)."""

    label: str
    inputs: int
    outputs: int
    function: Callable[[Tensor], Tensor]


TARGETS = {
    "f1": Target("|x|", 1, 1, torch.abs),
    "f2": Target("x sin(5x)", 1, 1, lambda x: x * torch.sin(5 * x)),
    "f3": Target("1[x>0] + 0.2 sin(5x)", 1, 1, lambda x: (x > 0).to(x.dtype) + 0.2 * torch.sin(5 * x)),
    "f4": Target("(x1+x2, x1-x2)", 2, 2, lambda x: torch.stack((x[0] + x[1], x[0] - x[1]))),
    "f4_abs": Target("(|x1+x2|, |x1-x2|)", 2, 2, lambda x: torch.stack((x[0] + x[1], x[0] - x[1])).abs()),
}


@dataclass(frozen=True)
class Cell:
    """One cell of table 2, with all settings that its result depends on.

    Attributes:
        function: A key of `TARGETS`.
        method: "he" or "rai" (ReLU from that initialisation), "sugar_<surrogate>" (from He) or "rai_sugar_<surrogate>".
        depth: Number of hidden layers.
        width: Units per hidden layer.
        runs: Independent runs, numbered from 0; each has its own data, weights and shuffles.
        epochs: Passes over the 3000 samples.
        seed: Seeds the runs.
    """

    function: str
    method: str
    depth: int = 10
    width: int = 2
    runs: int = 100
    epochs: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        if self.function not in TARGETS:
            raise ValueError(unknown_name("function", self.function, list(TARGETS)))
        if not self.initialisation:
            valid = ["he", "rai", *(f"{p}_{s}" for p in ("sugar", "rai_sugar") for s in list_surrogates())]
            raise ValueError(unknown_name("method", self.method, valid))
        if self.surrogate is not None:
            get_surrogate(self.surrogate)
        for name, least in (("depth", 1), ("width", 1), ("runs", 1), ("epochs", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")

    @property
    def initialisation(self) -> str:
        """ "he" or "rai"."""
        head, found, _ = self.method.partition("sugar_")
        return {"": "he", "rai_": "rai"}.get(head, "") if found else {"he": "he", "rai": "rai"}.get(head, "")

    @property
    def surrogate(self) -> str | None:
        """Name of the surrogate, or None for plain ReLU."""
        _, found, surrogate = self.method.partition("sugar_")
        return surrogate if found else None

    @property
    def sizes(self) -> list[int]:
        """Inputs, hidden units of each layer, outputs."""
        target = TARGETS[self.function]
        return [target.inputs, *[self.width] * self.depth, target.outputs]

    @property
    def settings(self) -> dict[str, Any]:
        """All settings that the cell's result depends on, JSON-ready."""
        alpha = None if self.surrogate is None else get_surrogate(self.surrogate).alpha
        return {**asdict(self), "alpha": alpha}


class BatchedNetwork:
    """Fully connected ReLU networks of one shape, one per run, computed as a batch.

    Activations are (units, runs, samples), parameters (outputs, inputs + 1, runs), with the bias last. Products are
    written as broadcast multiply-adds along the samples, so that the result of one run, including rounding, does not
    depend on the number of runs. Use one thread and multiples of 32 samples: then no vectorised loop has a remainder
    that is rounded differently.

    Args:
        sizes: Inputs, hidden units of each layer, outputs.
        runs: Number of networks.
        surrogate: Backward pass of the hidden layers: a surrogate's name, or None for the derivative of ReLU.
        dtype: Floating-point type of the parameters.
    """

    def __init__(self, sizes: list[int], runs: int, surrogate: str | None = None, dtype: torch.dtype = torch.float32):
        shapes = [(out, fan_in + 1, runs) for fan_in, out in pairwise(sizes)]
        count = sum(math.prod(shape) for shape in shapes)
        self.flat = torch.zeros(math.ceil(count / 64) * 64, dtype=dtype)
        self.flat.grad = torch.zeros_like(self.flat)
        self.layers = _views(self.flat, shapes)
        self._gradients = _views(self.flat.grad, shapes)
        self._columns = [[w[:, k, :, None] for k in range(w.shape[1])] for w in self.layers]
        self._rows = [[w[i, :-1, :, None] for i in range(w.shape[0])] for w in self.layers]
        self._surrogate = None if surrogate is None else get_surrogate(surrogate)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Map inputs (d_in, runs, samples) to the input and the pre-activation of every layer.

        The last pre-activation is the output, (d_out, runs, samples).
        """
        inputs: list[Tensor] = []
        z: list[Tensor] = []
        for *columns, bias in self._columns:
            if z:
                x = torch.relu(z[-1])
            a = (columns[0] * x[0]).add_(bias)
            for column, value in zip(columns[1:], x[1:], strict=True):
                a.addcmul_(column, value)
            inputs.append(x)
            z.append(a)
        return inputs, z

    def backward(self, inputs: list[Tensor], z: list[Tensor], grad: Tensor) -> None:
        """Overwrite the gradients of the parameters, given those of the output (d_out, runs, samples)."""
        for layer in reversed(range(len(z))):
            gradients = self._gradients[layer]
            torch.sum(grad[:, None] * inputs[layer], -1, out=gradients[:, :-1])
            torch.sum(grad, -1, out=gradients[:, -1])
            if layer:
                rows = self._rows[layer]
                dh = rows[0] * grad[0]
                for row, value in zip(rows[1:], grad[1:], strict=True):
                    dh.addcmul_(row, value)
                grad = self._through_activation(dh, z[layer - 1])

    def _through_activation(self, grad: Tensor, z: Tensor) -> Tensor:
        if self._surrogate is None:
            gradient: Tensor = torch.ops.aten.threshold_backward(grad, z, 0)
            return gradient
        return grad.mul_(self._surrogate.derivative(z, self._surrogate.alpha))


def _views(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    sizes = [math.prod(shape) for shape in shapes]
    parts = flat[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _generator(cell: Cell, run: int, purpose: str) -> torch.Generator:
    # torch's CPU generator uses only the lower 32 bits of a seed; Python hashes the whole string into them.
    seed = random.Random(f"{cell.seed}/{run}/{purpose}").getrandbits(32)
    return torch.Generator().manual_seed(seed)


def plain_network(cell: Cell) -> nn.Sequential:
    """One network of the cell as an ordinary module, without initialised weights."""
    activation = nn.ReLU() if cell.surrogate is None else Sugar(cell.surrogate)
    layers = [nn.utils.skip_init(nn.Linear, i, o) for i, o in pairwise(cell.sizes)]
    return nn.Sequential(*(m for layer in layers for m in (layer, activation)))[:-1]


def initialise(network: nn.Sequential, cell: Cell, run: int) -> nn.Sequential:
    """Initialise a `plain_network` with the weights of a run. They do not depend on the surrogate."""
    generator = _generator(cell, run, "weights")
    if cell.initialisation == "rai":
        return randomized_asymmetric_(network, generator)
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
    return network


def samples(cell: Cell, run: int) -> Tensor:
    """The inputs of a run, uniform on [-sqrt(3), sqrt(3)], of shape (d_in, 3000)."""
    uniform = torch.rand(TARGETS[cell.function].inputs, SAMPLES, generator=_generator(cell, run, "data"))
    return math.sqrt(3) * (2 * uniform - 1)


@torch.no_grad()
def train(cell: Cell) -> dict[str, Any]:
    """Train all runs of a cell at once; the result of a run does not depend on their number.

    Returns:
        JSON-ready: the cell's settings; per run `loss` (final mean squared error on the 3000 samples), `variance` (of
        the target, the loss of the best constant), `born_dead` and `dead` (a hidden layer is inactive on all
        samples before and after training); per epoch, the start included, `activation` (per run: fraction of
        positive pre-activations over hidden units and 512 samples); `prediction` on `GRID` if the input is a scalar;
        `seconds` of CPU time, equal to wall time on an idle core.
    """
    started = time.process_time()
    with _one_thread():
        target = TARGETS[cell.function]
        network = BatchedNetwork(cell.sizes, cell.runs, cell.surrogate)
        template = plain_network(cell)
        for run in range(cell.runs):
            initialise(template, cell, run)
            for rows, layer in zip(network.layers, template[::2], strict=True):
                weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
                rows[..., run] = torch.cat((weight, bias[:, None]), 1)

        x = torch.zeros(target.inputs, cell.runs, _BATCHES * BATCH_SIZE)
        x[..., :SAMPLES] = torch.stack([samples(cell, run) for run in range(cell.runs)], 1)
        y = target.function(x)
        result = {**cell.settings, "born_dead": _dead(network, x)}
        result["activation"] = [_activation(network, x)]

        shuffles = [_generator(cell, run, "shuffles") for run in range(cell.runs)]
        order = torch.arange(_BATCHES * BATCH_SIZE).repeat(cell.runs, 1)  # the padding stays in the last batch
        scale = torch.full((_BATCHES * BATCH_SIZE,), 2 / (BATCH_SIZE * target.outputs))
        last = SAMPLES - (_BATCHES - 1) * BATCH_SIZE
        scale[-BATCH_SIZE:] = 2 / (last * target.outputs)
        scale[SAMPLES:] = 0
        scale = scale.view(_BATCHES, BATCH_SIZE)
        optimizer = torch.optim.Adam([network.flat], lr=LEARNING_RATE, fused=True)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, MILESTONES, gamma=0.1)
        for _ in range(cell.epochs):
            for run, generator in enumerate(shuffles):
                torch.randperm(SAMPLES, generator=generator, out=order[run, :SAMPLES])
            for inputs, outputs, factor in zip(_batches(x, order), _batches(y, order), scale, strict=True):
                h, z = network.forward(inputs)
                network.backward(h, z, (z[-1] - outputs) * factor)
                optimizer.step()
            scheduler.step()
            result["activation"].append(_activation(network, x))

        real = slice(0, SAMPLES)
        result["dead"] = _dead(network, x)
        output = network.forward(x)[1][-1]
        result["loss"] = (output - y)[..., real].double().square().mean((0, 2)).tolist()
        result["variance"] = y[..., real].double().var(-1, correction=0).mean(0).tolist()
        if target.inputs == 1:
            result["prediction"] = network.forward(GRID.expand(1, cell.runs, -1))[1][-1][0].tolist()
    return {**result, "seconds": time.process_time() - started}


def train_alone(cell: Cell, run: int) -> float:
    """Train one run as an ordinary module with autograd; return its final mean squared error.

    It equals the run's loss from `train` except for rounding errors, which training amplifies.
    """
    with _one_thread():
        x = samples(cell, run).T
        y = TARGETS[cell.function].function(x.T).reshape(-1, SAMPLES).T
        network = initialise(plain_network(cell), cell, run)
        optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, MILESTONES, gamma=0.1)
        shuffle = _generator(cell, run, "shuffles")
        for _ in range(cell.epochs):
            for batch in torch.randperm(SAMPLES, generator=shuffle).split(BATCH_SIZE):
                optimizer.zero_grad()
                F.mse_loss(network(x[batch]), y[batch]).backward()
                optimizer.step()
            scheduler.step()
        with torch.no_grad():
            return F.mse_loss(network(x), y).item()


def run_cells(cells: Iterable[Cell], folder: Path, jobs: int = 1) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Yield the results of cells as they finish; results of an earlier call are loaded from `folder`.

    Args:
        cells: Cells to run.
        folder: Stores one JSON file per cell: the result of `train`, and `seconds_one_by_one`, the CPU time of
            training the runs one by one, extrapolated from at most two epochs of one run.
        jobs: Number of processes, each with one thread. With 1, and for surrogates registered by the caller, which
            other processes do not have, cells run in this process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    here, elsewhere = [], []
    for cell in cells:
        result = _load(cell, folder)
        if result is not None:
            yield cell, result
        elif jobs == 1 or not _is_built_in(cell.surrogate):
            here.append(cell)
        else:
            elsewhere.append(cell)
    elsewhere.sort(key=lambda cell: -cell.depth * cell.width)  # the longest first, to balance the processes
    # A fork would copy the locks of torch's threads in an undefined state.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_run_and_save, cell, folder): cell for cell in elsewhere}
        try:
            for cell in here:
                yield cell, _run_and_save(cell, folder)
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _is_built_in(surrogate: str | None) -> bool:
    return surrogate is None or get_surrogate(surrogate).derivative.__module__ == get_surrogate.__module__


def _path(cell: Cell, folder: Path) -> Path:
    return folder / f"{cell.function}-{cell.method}-{cell.depth}x{cell.width}.json"


def _load(cell: Cell, folder: Path) -> dict[str, Any] | None:
    try:
        result = json.loads(_path(cell, folder).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return result if cell.settings.items() <= result.items() else None


def _run_and_save(cell: Cell, folder: Path) -> dict[str, Any]:
    result = train(cell)
    epochs = min(2, cell.epochs)
    started = time.process_time()
    train_alone(replace(cell, epochs=epochs), 0)
    result["seconds_one_by_one"] = (time.process_time() - started) * cell.runs * cell.epochs / max(1, epochs)
    for name in ("activation", "prediction"):
        if name in result:
            result[name] = [[round(value, 4) for value in row] for row in result[name]]
    write_file(_path(cell, folder), json.dumps(result))
    return result


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _batches(values: Tensor, order: Tensor) -> Tensor:
    shuffled = values.gather(2, order.expand(len(values), -1, -1))
    batches: Tensor = shuffled.unflatten(2, (_BATCHES, BATCH_SIZE)).permute(2, 0, 1, 3).contiguous()
    return batches


def _activation(network: BatchedNetwork, x: Tensor) -> list[float]:
    hidden = torch.stack(network.forward(x[..., :_TRACKED])[1][:-1])
    return (hidden > 0).double().mean((0, 1, 3)).tolist()


def _dead(network: BatchedNetwork, x: Tensor) -> list[bool]:
    hidden = torch.stack(network.forward(x[..., :SAMPLES])[1][:-1])
    return (hidden > 0).any(3).any(1).logical_not().any(0).tolist()
