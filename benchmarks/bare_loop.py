"""The fastest bare training loop in torch, the baseline for trainers.

    python benchmarks/bare_loop.py [--act-layer relu sugar_bsilu] [--compile graph] [--loops 4] [--device cuda]

All images are on the device, as uint8, and are gathered, cropped, flipped and normalised there; the learning rates of
all steps are a tensor on the device too. No step synchronises with the device, so a step on a GPU is one CUDA graph.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COMPILE = ("none", "default", "reduce-overhead", "graph", "compiled-graph")


def place(pixels: Tensor, device: torch.device, padding: int = 0) -> Tensor:
    """Return uint8 images (N, C, H, W) as (N, H, W, C) on `device`, with a black border of `padding` pixels."""
    return F.pad(pixels.to(device), (padding,) * 4).permute(0, 2, 3, 1).contiguous()


class BareLoop:
    """SGD with Nesterov's momentum on images on the device, epoch by epoch.

    Args:
        model: Takes (B, C, side, side); trained in place, in channels_last.
        images: Images from `place`. If they are padded, each image is cropped and flipped at random.
        labels: Class of each image, int64, (N,), on the same device.
        mean, std: Mean and standard deviation of each channel, for pixels in [0, 1].
        side: Input size of the model in pixels.
        epochs: The learning rate falls from `lr` to 0 over these epochs with a cosine schedule, updated every step.
        weight_decay: Applied to weights, not to biases and BatchNorm.
        seed: Order of the images, crops and flips are a function of the seed and the epoch.
        dtype: torch.bfloat16 for autocast, torch.float32 for none.
        compile: "none", a mode of torch.compile, "graph": each step is one CUDA graph of eager operations, or
            "compiled-graph": the same with compiled operations.
        adjust: Called between backward and the optimizer with the batch and its labels; must not synchronise.
        steps: Steps per epoch; None for all full batches.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float], *,
        side: int = 32, epochs: int = 20, batch_size: int = 128, lr: float = 0.1, momentum: float = 0.9,
        weight_decay: float = 0.0, seed: int = 42, dtype: torch.dtype = torch.bfloat16, compile: str = "none",
        adjust: Callable[[Tensor, Tensor], None] | None = None, steps: int | None = None,
    ):  # fmt: skip
        device = images.device
        if compile not in COMPILE:
            raise ValueError(f"compile must be one of {', '.join(COMPILE)}, not {compile!r}")
        if "graph" in compile and device.type != "cuda":
            raise ValueError(f"compile={compile!r} captures a CUDA graph and needs a GPU, not {device.type}")
        if len(labels) < batch_size:
            raise ValueError(f"{len(labels)} images are fewer than a batch of {batch_size}")
        self.model = model.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        mode = {"default": "default", "reduce-overhead": "reduce-overhead", "compiled-graph": "default"}.get(compile)
        self._forward: Callable[[Tensor], Tensor] = torch.compile(model, mode=mode) if mode else model
        self.images, self.labels, self.side, self.seed, self.dtype = images, labels, side, seed, dtype
        self.compile, self.adjust, self.batch_size = compile, adjust, batch_size
        self.steps = min(len(labels) // batch_size, steps or len(labels))
        self.padding = (images.shape[1] - side) // 2
        self.scale = (1 / (255 * torch.tensor(std))).to(device)
        self.shift = (torch.tensor(mean) / torch.tensor(std)).to(device)
        self.pixels, self.channels = torch.arange(side, device=device), torch.arange(images.shape[3], device=device)
        total = epochs * self.steps
        self.rates = torch.tensor([lr * 0.5 * (1 + math.cos(math.pi * t / total)) for t in range(total)], device=device)
        self.lr, self.loss_sum = torch.tensor(lr, device=device), torch.zeros((), device=device)
        self.index = torch.arange(batch_size, device=device)
        self.draws = torch.zeros(len(labels), 3, dtype=torch.int64, device=device)
        decayed = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim <= 1]
        groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
        self.optimizer = torch.optim.SGD(
            [group for group in groups if group["params"]], lr=self.lr, momentum=momentum, nesterov=True, fused=True
        )
        self._run: Callable[[], Any] = self._step
        if "graph" in compile:
            self._capture()

    def batch(self) -> Tensor:
        """Return the images at `self.index`, float32, normalised, (B, C, side, side) in channels_last."""
        pixels = self.images[self.index] if not self.padding else self._crop()
        return (pixels.float() * self.scale - self.shift).permute(0, 3, 1, 2)

    def _crop(self) -> Tensor:
        flip, top, left = self.draws[self.index].unbind(1)
        rows = top[:, None] + self.pixels
        columns = left[:, None] + torch.where(flip[:, None] > 0, self.side - 1 - self.pixels, self.pixels)
        return self.images[self.index[:, None, None], rows[:, :, None], columns[:, None, :]]

    def _step(self) -> None:
        self.optimizer.zero_grad()
        images, labels = self.batch(), self.labels[self.index]
        enabled = self.dtype != torch.float32
        with torch.autocast(images.device.type, self.dtype, enabled, cache_enabled=False):
            loss = F.cross_entropy(self._forward(images).float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.adjust is not None:
            self.adjust(images, labels)
        self.optimizer.step()
        self.loss_sum += loss.detach()

    def _capture(self) -> None:
        """Capture a step as one CUDA graph, and restore the state that the warm-up changed."""
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.model.load_state_dict(before)
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()
        self.loss_sum.zero_()
        self._run = graph.replay

    def train_epoch(self, epoch: int) -> Iterator[None]:
        """Yield after each step is queued; `self.loss_sum / self.steps` is the mean loss at the end."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        count = len(self.labels)
        order = self._copy(torch.randperm(count, generator=generator))
        if self.padding:
            flip = torch.randint(2, (count, 1), generator=generator)
            offset = torch.randint(2 * self.padding + 1, (count, 2), generator=generator)
            self.draws.copy_(self._copy(torch.cat([flip, offset], 1)))
        self.loss_sum.zero_()
        self.model.train()
        for step in range(self.steps):
            self.index.copy_(order[step * self.batch_size : (step + 1) * self.batch_size])
            self.lr.copy_(self.rates[epoch * self.steps + step])
            self._run()
            yield

    def _copy(self, numbers: Tensor) -> Tensor:
        cuda = self.images.is_cuda
        return (numbers.pin_memory() if cuda else numbers).to(self.images.device, non_blocking=cuda)

    @torch.no_grad()
    def logits(self, images: Tensor, batch_size: int = 1000) -> Iterator[Tensor]:
        """Yield the logits of images from `place` without padding, in eval mode, batch by batch."""
        self.model.eval()
        for batch in images.split(batch_size):
            normalised = (batch.float() * self.scale - self.shift).permute(0, 3, 1, 2)
            with torch.autocast(images.device.type, self.dtype, self.dtype != torch.float32, cache_enabled=False):
                found: Tensor = self.model(normalised)
            yield found.float()
        self.model.train()


def together(loops: Iterable[Iterator[Any]], count: int) -> None:
    """Run `count` loops at once, one step each in turn; on a GPU each has its own stream, so that kernels overlap.

    Args:
        loops: When a loop ends, the next one starts on its stream.
    """
    waiting = iter(loops)
    cuda = torch.cuda.is_available()
    free: list[Any] = [torch.cuda.Stream() if cuda else None for _ in range(count)]
    for stream in free if cuda else ():
        stream.wait_stream(torch.cuda.current_stream())
    running: list[tuple[Iterator[Any], Any]] = []
    while True:
        while free and (loop := next(waiting, None)) is not None:
            running.append((loop, free.pop()))
        if not running:
            break
        for loop, stream in list(running):
            with torch.cuda.stream(stream):
                if next(loop, running) is running:
                    running.remove((loop, stream))
                    free.append(stream)
    if cuda:
        torch.cuda.synchronize()


def main() -> None:
    import timm_sugar

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18_cifar_sugar_bsilu")
    parser.add_argument("--act-layer", nargs="+", default=["relu", "sugar_bsilu"])
    parser.add_argument("--compile", nargs="+", default=None, choices=COMPILE, help="default: none, and graph on a GPU")
    parser.add_argument("--loops", type=int, nargs="+", default=[1], help="networks trained at once")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--augment", action="store_true", help="padded crops and flips")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    torch.backends.cudnn.benchmark = True
    generator = torch.Generator().manual_seed(0)
    count = args.steps * args.batch_size
    pixels = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    images = place(pixels, device, 4 * args.augment)
    labels = torch.randint(10, (count,), generator=generator).to(device)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else 'CPU'}, {args.model}, {args}")
    print("| activation | compile | loops | start, s | images/s |\n| --- | --- | --: | --: | --: |")
    for act_layer in args.act_layer:
        for compile in args.compile or (["none", "graph"] if cuda else ["none"]):
            for loops in args.loops:
                began = time.perf_counter()
                made = [
                    BareLoop(
                        timm_sugar.create_model(args.model, act_layer=act_layer, num_classes=10), images, labels,
                        (0.5,) * 3, (0.25,) * 3, epochs=2, batch_size=args.batch_size, compile=compile,
                    )
                    for _ in range(loops)
                ]  # fmt: skip
                seconds = [began]
                for epoch in range(2):  # the first is the warm-up
                    together((loop.train_epoch(epoch) for loop in made), loops)
                    seconds.append(time.perf_counter())
                speed = loops * count / (seconds[2] - seconds[1])
                print(f"| {act_layer} | {compile} | {loops} | {seconds[1] - began:.1f} | {speed:.0f} |", flush=True)


if __name__ == "__main__":
    main()
