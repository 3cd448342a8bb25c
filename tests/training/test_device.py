"""What keeps a device busy changes no bit: fused steps of SGD, copies that nobody waits for."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from timm_sugar.training import TrainConfig, train
from timm_sugar.training.device import HostCopy, place_images, use_fused_steps

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "settings", [dict(momentum=0.9, nesterov=True), dict(momentum=0.9, weight_decay=0.01), dict(weight_decay=0.1)]
)
def test_fused_sgd_gives_the_same_bits_and_state(settings, monkeypatch):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 16, 3).to(memory_format=torch.channels_last)
    plain = nn.ModuleList([conv, nn.Linear(64, 33), nn.Linear(33, 10), nn.Linear(4, 4)])  # whole lines and others
    fused = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, **settings) for net in (plain, fused)]
    use_fused_steps(optimizers[1], CPU)
    stepped, kernel = [], torch._fused_sgd_
    monkeypatch.setattr(
        torch, "_fused_sgd_", lambda params, *rest, **more: [stepped.extend(params), kernel(params, *rest, **more)]
    )
    for step in range(5):
        for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
            late = step < 2 and a.shape == (4, 4)  # has no gradient at first
            a.grad = None if late else torch.randn_like(a)
            b.grad = None if late else a.grad.clone(memory_format=torch.preserve_format)
            if a.shape == (33, 64) and step == 3:
                b.grad = b.grad.t().contiguous().t()  # laid out otherwise
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        assert torch.equal(a, b)
    assert {tuple(p.shape) for p in stepped} == {(16, 3, 3, 3), (16,), (33, 64), (4, 4)}
    first, second = (optimizer.state_dict() for optimizer in optimizers)
    assert first["param_groups"] == second["param_groups"]
    for index, state in first["state"].items():
        assert all(torch.equal(v, second["state"][index][name]) for name, v in state.items() if v is not None)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop])
def test_others_are_left_as_they_are_on_the_cpu(optimizer):
    made = optimizer(nn.Linear(16, 16).parameters(), lr=0.1)
    use_fused_steps(made, CPU)
    assert not made.param_groups[0].get("fused")
    assert not made._optimizer_step_pre_hooks


def test_adamw_is_fused_on_a_gpu():
    made = torch.optim.AdamW(nn.Linear(16, 16, device="meta").parameters(), lr=0.1)
    use_fused_steps(made, torch.device("cuda"))
    assert made.param_groups[0]["fused"]


def test_a_host_copy_is_the_last_value_on_the_cpu():
    seen = HostCopy(torch.tensor([1.0, 2.0]))
    assert seen.read() == [1.0, 2.0]
    seen.update(torch.tensor([3.0, 4.0]))
    assert seen.read() == [3.0, 4.0]
    number = HostCopy(torch.tensor(-1))
    number.update(torch.tensor(7))
    assert number.read() == 7


class Pixels:
    """Images of some size, which say where they go."""

    def __init__(self, nbytes):
        self.nbytes, self.device = nbytes, "host"

    def to(self, device):
        moved = Pixels(self.nbytes)
        moved.device = str(device)
        return moved


@pytest.mark.parametrize(
    ("device", "free", "where"),
    [
        ("cuda", 2200, ["cuda", "cuda", "cuda"]),
        ("cuda", 2100, ["cuda", "cuda", "host"]),  # half of it holds training and validation images
        ("cuda", 1998, ["host", "cuda", "cuda"]),
        ("cuda", 10, ["host", "host", "host"]),
        ("cpu", 2200, ["host", "host", "host"]),
    ],
)
def test_images_go_to_a_gpu_as_far_as_half_its_free_memory_takes_them(device, free, where, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 10**6))
    splits = [SimpleNamespace(pixels=Pixels(size), labels=Pixels(1)) for size in (1000, 50, 50)]
    place_images(SimpleNamespace(train=splits[0], val=splits[1], test=splits[2]), torch.device(device))
    assert [split.pixels.device for split in splits] == where
    assert [split.labels.device for split in splits] == where


class Late(HostCopy):
    """A copy that arrives after the step that would read it, as on a GPU that is behind."""

    def update(self, tensor):
        pass


@pytest.mark.parametrize("more", [{}, {"checkpoint_steps": 3}, {"checkpoint_minutes": 0}])
def test_a_loss_that_is_not_finite_is_noticed_before_anything_is_saved(more, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["timm_sugar.training.train"], "HostCopy", Late)
    config = TrainConfig(
        data="digits", model_args={"channels": [8, 8, 8, 8]}, img_size=16, batch_size=16, limit_train=160, epochs=2,
        opt="momentum", lr=1e30, val_fraction=0.0, output=str(tmp_path), **more,
    )  # fmt: skip
    with pytest.raises(
        FloatingPointError, match=r"^the loss is not finite at step 2 \(epoch 1\), learning rate 1e\+30; "
    ):
        train(config)
    saved = [path.name for path in tmp_path.glob("checkpoints/*")]
    assert saved == (["step-000000001"] if "checkpoint_minutes" in more else [])
