"""The monitor in transformers' Trainer, in Lightning and in scripts of timm, as they log."""

import csv
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_sugar.__main__ import main
from timm_sugar.integrations.timm import monitored

NAMES = ["dead_units", "nearly_dead_units", "always_active_units", "activation_sparsity"]


class Network(nn.Module):
    """Of 4 units one is always active and one never."""

    def __init__(self):
        super().__init__()
        self.linear, self.act, self.head = nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
            self.linear.bias.copy_(torch.tensor([0.0, 0.0, 9.0, -9.0]))

    def forward(self, x, labels=None):
        logits = self.head(self.act(self.linear(x)))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def images(count=24):
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    return [{"x": x[i], "labels": torch.tensor(i % 3)} for i in range(count)]


def test_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    from timm_sugar.integrations.transformers import DeadUnitCallback

    model = Network()
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, num_train_epochs=2, logging_steps=3, eval_strategy="epoch",
        report_to="none", save_strategy="no", use_cpu=True, learning_rate=1e-4, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=images(), eval_dataset=images())
    trainer.add_callback(DeadUnitCallback(trainer, every=1))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "dead_units" in line]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert all(line["dead_units"] == line["always_active_units"] == 0.25 for line in lines)
    assert all(0.4 < line["activation_sparsity"] < 0.6 for line in lines)
    assert trainer.callback_handler.callbacks[-1].monitor.steps == 0  # each log is of the steps since the last
    assert not model.act._forward_pre_hooks


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.loggers import CSVLogger

    from timm_sugar.integrations.lightning import DeadUnitCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Network()

        def training_step(self, batch, index):
            return self.net(batch["x"], batch["labels"])["loss"]

        validation_step = training_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    module, callback = Module(), None
    callback = DeadUnitCallback(every=1)
    loader = torch.utils.data.DataLoader(images(), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[callback], logger=CSVLogger(tmp_path), log_every_n_steps=4,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=1,
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    (file,) = tmp_path.rglob("metrics.csv")
    lines = [line for line in csv.DictReader(file.read_text().splitlines()) if line["dead_units"]]
    assert [line["step"] for line in lines] == ["4", "8", "12"]
    assert {line["dead_units"] for line in lines} == {"0.25"}
    assert callback.monitor.steps == 12  # no batch of validation
    assert [layer.name for layer in callback.monitor.summary().layers] == ["net.act"]
    assert not module.net.act._forward_pre_hooks


# What timm's train.py does, in short: the same imports, names and calls.
TRAIN = """
import argparse, os
import torch
from timm import utils
from timm.models import create_model

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--output")
    args = parser.parse_args()
    model, teacher = create_model(args.model, num_classes=3), create_model("test_vit", img_size=32)
    for epoch in range(2):
        for _ in range(6):
            model.train()(torch.randn(4, 3, 32, 32)).sum().backward()
        model.eval()(torch.randn(4, 3, 32, 32))
        if args.output:
            utils.update_summary(
                epoch, {"loss": 1.5}, {"top1": 50.0}, filename=os.path.join(args.output, "summary.csv"), lr=0.1,
                write_header=epoch == 0,
            )
"""


def test_timm_script(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    command = [sys.executable, "-m", "timm_sugar", "--monitor", str(tmp_path / "train.py"), "--model", "test_resnet"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [*csv.DictReader((tmp_path / "summary.csv").read_text().splitlines())]
    assert [line["epoch"] for line in lines] == ["0", "1"]
    assert [*lines[0]] == ["epoch", "train_loss", *(f"train_{name}" for name in NAMES), "eval_top1", "lr"]
    assert all(0.2 < float(line["train_activation_sparsity"]) < 0.8 for line in lines)
    silent = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "no dead units were logged: nothing called timm.utils.update_summary" in silent.stderr


def test_nothing_of_timm_stays_changed():
    import timm

    before = timm.create_model, timm.models.create_model, timm.utils.update_summary

    def fails():
        with monitored():
            assert timm.create_model is not before[0]
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert (timm.create_model, timm.models.create_model, timm.utils.update_summary) == before


def test_monitor_without_a_script(capsys):
    assert main(["--monitor"]) == 2
    assert "usage: python -m timm_sugar [--monitor] SCRIPT" in capsys.readouterr().err


def test_libraries_are_imported_where_they_are_used_alone():
    program = (
        "import sys, timm_sugar, timm_sugar.__main__; print(sorted({'transformers', 'lightning'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
