"""Helper of test_processes.py: several small runs by all processes that it is started in, one after the other.

torchrun --nproc_per_node 2 tests/training/two_processes.py FOLDER DATA
"""

import json
import sys
from pathlib import Path

import torch

from timm_sugar.analysis import count_units, profile
from timm_sugar.data import evaluate_batches
from timm_sugar.models import build
from timm_sugar.training import TrainConfig, train
from timm_sugar.training.processes import process_state

TRANSFORMER = dict(
    model="swin_tiny_sugar_nelu",
    model_args=dict(embed_dim=24, depths=[1, 1], num_heads=[2, 4], window_size=4, drop_path_rate=0.0),
    opt="adamw", lr=0.001, epochs=2, img_size=32, limit_train=64, checkpoint_steps=3, crop="padded", hflip=0.5,
)  # fmt: skip
BATCH_NORM = dict(model_args=dict(channels=[8, 8, 8, 8]), epochs=1, limit_train=64, lr=0.0)
TOKENS = torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU())


def run_all(folder: Path, data: str, processes: int) -> None:
    """Train a transformer and a network with BatchNorm on the same global batch, whatever the number of processes."""
    for name, settings in (("transformer", TRANSFORMER), ("batch_norm", BATCH_NORM)):
        train(TrainConfig(data=data, batch_size=16 // processes, output=str(folder / name), **settings))


def share_evaluation(folder: Path) -> None:
    """Evaluate 5 images, 1 image, and images of which the first process has none, and write what comes out."""
    state = process_state()
    torch.manual_seed(0)
    model = build("resnet18_sugar_bsilu", num_classes=4, channels=[8, 8, 8, 8]).eval()
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(5) % 4
    found = {}
    for count in (5, 1):
        mine = slice(state.process_index, count, state.num_processes)
        with count_units(model) as units:
            batches = [(pixels[mine], labels[mine])]
            result = evaluate_batches(model, batches, (0.5,) * 3, (0.25,) * 3, classes=4)
        if state.num_processes > 1:
            units.add_up_processes(torch.device("cpu"))
        profiled = profile(model, [pixels[mine] / 255.0])
        tokens = profile(TOKENS, [torch.linspace(-1, 1, 6).view(1, 3, 2)[:, : 1 + i % 3] for i in range(count)][mine])
        found[count] = [result.loss, result.top1, result.images, units.dead_elements, units.sparsity]
        found[count] += [profiled.images, profiled.dead_units, profiled.sparsity, tokens.images, tokens.sparsity]
        assert result.confusion is not None
        found[count] += [cell for row in result.confusion for cell in row]
        found[count] += [-1 if accuracy is None else accuracy for accuracy in result.class_top1]
    if state.is_main_process:
        (folder / "evaluation.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), sys.argv[2], process_state().num_processes)
    share_evaluation(Path(sys.argv[1]))
    process_state().destroy_process_group()
