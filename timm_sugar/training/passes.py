"""Forward and backward pass of a training step; if compiled on a GPU, they form one CUDA graph."""

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

_WARM_UP = 3  # passes before a capture, as in torch's documentation


class Passes:
    """Accumulates the gradients of batches in the network's parameters, and counts dead `units`.

    A CUDA graph replays the kernels of one forward and backward pass without host overhead. It does not include the
    rest of a step: batches, random seeds, Mixup, clipping, the optimizer and its schedules. It is captured at the first
    batch; all batches must have the same shape.

    Args:
        network, model: The network, and the same network as wrapped by torch.compile and accelerate.
        steps: Number of steps per epoch.
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
        # Not for compiled code: the hooks would change the code that is compiled.
        self.units = TrainingUnits(network, 0 if config.compile or graph else steps * config.grad_accum)
        self.graph = graph
        compiling = "compiling and capturing a CUDA graph" if graph else "compiling"
        self.warm_up = compiling if config.compile else "training"  # label of the progress bar during the first step
        self._network, self._model, self._accelerator = network, model, accelerator
        # Mixup applies label smoothing itself.
        self._smoothing = 0.0 if config.mixup or config.cutmix else config.smoothing
        self._activation: Activation | None = None
        self._captured: Any = None
        self._batch: tuple[Tensor, Tensor] | None = None
        self._result: tuple[Tensor, Tensor] | None = None

    def begin_epoch(self, activation: Activation, steps: int, unit_counts: dict[str, Any] | None) -> None:
        """Begin an epoch with this surrogate and alpha, or resume it after `steps` steps with their `unit_counts`."""
        if activation != self._activation:
            set_activation(self._network, activation)
            self._activation, self._captured = activation, None  # a graph contains them as constants
        self.units.begin(steps * self._accumulation, unit_counts)

    def __call__(self, inputs: Tensor, targets: Tensor, first: bool) -> tuple[Tensor, Tensor]:
        """Return the mean loss, (), and the logits, (B, classes); both are valid until the next call.

        Args:
            inputs: Float32, (B, 3, H, W).
            targets: Classes, int64, (B,), or probabilities, (B, classes).
            first: Whether it is the first pass of a step, which resets the gradients. If they were reset at the end of
                the step, glibc would return their memory to the system, and reallocation would cause page faults.
        """
        if first and not self.graph:
            self._network.zero_grad()
        elif first and self._accumulation > 1:
            self._network.zero_grad(set_to_none=False)  # the graph accumulates in place
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
        """Capture the graph before the first pass of a step; weights, buffers and random state do not change."""
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
                # The captured pass writes the gradients if they are None, and otherwise accumulates in them.
                self._network.zero_grad(set_to_none=self._accumulation == 1)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # allows the pin-memory thread to run
                    self._result = self._run(*self._batch)
            self._captured = graph
        except RuntimeError as error:
            self.graph = False
            self._network.zero_grad()
            warnings.warn(f"trained without a CUDA graph: {str(error).partition(chr(10))[0]}", stacklevel=2)
        for buffer, before in buffers:
            buffer.copy_(before)


def graph_of(config: TrainConfig, accelerator: Accelerator) -> bool:
    """Whether a step of this run can be a CUDA graph; warn with the reason if it is compiled for a GPU but cannot."""
    if not config.compile or accelerator.device.type != "cuda":
        return False
    why = "the gradient scaler of fp16 waits for the GPU" if accelerator.scaler is not None else ""
    if accelerator.num_processes > 1:
        why = "of several processes"
    if why and accelerator.is_main_process:
        warnings.warn(f"compiled without a CUDA graph: {why}", stacklevel=2)
    return not why
