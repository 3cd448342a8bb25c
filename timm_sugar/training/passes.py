"""Forward and backward pass of a training step; compiled on a GPU, they are one CUDA graph."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from ..layers import Activation
from ..settings import TrainConfig
from .schedules import set_activation
from .units import TrainingUnits

_WARM_UP = 3  # passes before a capture, as many as torch's documentation takes


class Passes:
    """Adds the gradients of a batch to those of the network's parameters, and counts dead `units` in the passes.

    A CUDA graph replays the kernels of one forward and backward pass without the host's part in them. What a step does
    besides is no part of it: batches, random seeds, Mixup, clipping, the optimizer and its schedules. It is captured
    at the first batch; all batches must be of one shape.

    Args:
        network, model: What holds the weights, and the same as accelerate and torch.compile wrap it.
        steps: Of an epoch.
    """

    def __init__(
        self,
        config: TrainConfig,
        network: nn.Module,
        model: nn.Module,
        accelerator: Accelerator,
        graph: bool,
        steps: int = 1,
    ):
        self._accumulation = config.grad_accum
        # In compiled code it would be other code that is trained.
        self.units = TrainingUnits(network, 0 if config.compile or graph else steps * config.grad_accum)
        self.graph = graph
        compiling = "compiling and capturing a CUDA graph" if graph else "compiling"
        self.warm_up = compiling if config.compile else "training"  # what the first step does before it trains
        self._network, self._model, self._accelerator = network, model, accelerator
        # Mixup smooths its targets itself.
        self._smoothing = 0.0 if config.mixup or config.cutmix else config.smoothing
        self._activation: Activation | None = None
        self._captured: Any = None
        self._batch: tuple[Tensor, Tensor] | None = None
        self._result: tuple[Tensor, Tensor] | None = None

    def begin_epoch(self, activation: Activation, steps: int, unit_counts: dict[str, Any] | None) -> None:
        """Begin an epoch with this surrogate and alpha, or go on after so many steps with what was counted in them."""
        if activation != self._activation:
            set_activation(self._network, activation)
            self._activation, self._captured = activation, None  # they are constants of a graph
        self.units.begin(steps * self._accumulation, unit_counts)

    def __call__(self, inputs: Tensor, targets: Tensor, first: bool) -> tuple[Tensor, Tensor]:
        """Return the mean loss, (), and the logits, (B, classes), until the next call.

        Args:
            inputs: Float32, (B, 3, H, W).
            targets: Classes, int64, (B,), or probabilities, (B, classes).
            first: Whether it is the first pass of a step. The gradients of the last one are forgotten here, not at its
                end, where glibc would return their memory to the system, to get it again page by page.
        """
        if first and not self.graph:
            self._network.zero_grad()
        elif first and self._accumulation > 1:
            self._network.zero_grad(set_to_none=False)  # a graph adds to them where they are
        if self.graph and self._captured is None:
            self._capture(inputs, targets)
        if not self.graph:
            return self._run(inputs, targets)
        assert self._batch is not None
        assert self._result is not None
        self._batch[0].copy_(inputs)
        self._batch[1].copy_(targets)
        self._captured.replay()
        return self._result

    def _run(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._model(inputs)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=self._smoothing)
        self._accelerator.backward(loss)
        return loss.detach(), logits.detach()

    def _capture(self, inputs: Tensor, targets: Tensor) -> None:
        """Capture a pass before the first one of a step; weights, buffers and random state are left as they were."""
        buffers = [(buffer, buffer.clone()) for buffer in self._network.buffers()]
        self._batch = (inputs.clone(), targets.clone())
        try:
            with torch.random.fork_rng([inputs.device] if inputs.is_cuda else []):
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(_WARM_UP):
                        self._network.zero_grad()
                        self._run(*self._batch)
                torch.cuda.current_stream().wait_stream(side)
                # A pass writes gradients where there are none, or adds to those that there are.
                self._network.zero_grad(set_to_none=self._accumulation == 1)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a thread that pins may go on
                    self._result = self._run(*self._batch)
            self._captured = graph
        except RuntimeError as error:
            self.graph = False
            self._network.zero_grad()
            warnings.warn(f"trained without a CUDA graph: {str(error).partition(chr(10))[0]}", stacklevel=2)
        for buffer, before in buffers:
            buffer.copy_(before)


def graph_of(config: TrainConfig, accelerator: Accelerator) -> bool:
    """Whether a step of this run can be a CUDA graph; if it is compiled for a GPU and cannot, a warning says why."""
    if not config.compile or accelerator.device.type != "cuda":
        return False
    why = "the gradient scaler of fp16 waits for the GPU" if accelerator.scaler is not None else ""
    if accelerator.num_processes > 1:
        why = "of several processes"
    if why and accelerator.is_main_process:
        warnings.warn(f"compiled without a CUDA graph: {why}", stacklevel=2)
    return not why
