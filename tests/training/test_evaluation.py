"""Evaluation of a split gives the same in the large batches of a GPU as in those of a CPU."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from timm_sugar.training import TrainConfig
from timm_sugar.training.evaluation import evaluate_split
from timm_sugar.training.train import build


class Reads(TorchDispatchMode):
    """Counts how often a tensor's value is read."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
        return func(*args, **kwargs or {})


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # there may be no GPU
@pytest.mark.parametrize("memory_limit", [4, 0])
def test_large_batches_give_the_same(memory_limit, tmp_path):
    small = dict(model_args={"channels": [8, 8, 8, 8]}, img_size=16, mean=[0.3] * 3, std=[0.4] * 3)
    run = build(TrainConfig(data="digits", output=str(tmp_path), memory_limit=memory_limit, workers=0, **small))
    sizes, found, count = [], [], []
    run.evaluated.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for device in ("cpu", "cuda"):
        accelerator = SimpleNamespace(device=torch.device(device), num_processes=1)
        with Reads() as reads:
            found.append(evaluate_split(run.evaluated, run.images, accelerator, 0, None, "test"))
        count.append(reads.count)
    assert sizes == [256, 103, 359]
    assert memory_limit == 0 or count[0] == count[1]  # none a batch; workers read the indices of their images
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():  # sums of floats have another order
        assert found[1][key] == (pytest.approx(value, rel=1e-5) if key.endswith("loss") else value), key
