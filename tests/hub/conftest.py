"""A Hub on loopback, finished runs to publish, and processes that use the unpatched client against it."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from timm_sugar.training import TrainConfig, train

from .hub_server import GOOD_TOKEN, Hub


@dataclass
class Result:
    status: int
    out: str
    err: str


class Client:
    """`tests/hub/client_process.py`, started once: importing torch takes longer than a test."""

    def __init__(self, environment: dict[str, str]):
        script = Path(__file__).with_name("client_process.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def __call__(self, *argv: object, **env: str | None) -> Result:
        return self._ask({"argv": [str(arg) for arg in argv], "env": env})

    def python(self, code: str, **env: str | None) -> Result:
        return self._ask({"code": code, "env": env})

    def _ask(self, request: dict) -> Result:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Result(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.kill()  # it has nothing to keep, and an orderly end takes seconds
        self.process.communicate()


@pytest.fixture(scope="session")
def _server():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def hub(_server) -> Hub:
    """An empty Hub."""
    _server.reset()
    return _server


@pytest.fixture(scope="session")
def environment(_server, tmp_path_factory) -> dict[str, str]:
    """Environment of a process that uses the Hub on loopback, with a cache of its own."""
    ours = {
        "HF_ENDPOINT": _server.endpoint,
        "HF_TOKEN": GOOD_TOKEN,
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
    }
    return {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TIMM_SUGAR"))} | ours


@pytest.fixture(scope="session")
def _clients(environment):
    clients = [Client(environment) for _ in range(2)]
    yield clients
    for client in clients:
        client.close()


@pytest.fixture
def cli(_clients) -> Client:
    """The command line."""
    return _clients[0]


@pytest.fixture
def other_cli(_clients) -> Client:
    """The same in another process."""
    return _clients[1]


@pytest.fixture(scope="session")
def run_folder(parquet_folder, tmp_path_factory) -> Path:
    """A finished run of a small network whose architecture timm has."""
    output = tmp_path_factory.mktemp("run") / "secret-place"
    settings = dict(epochs=2, batch_size=32, opt="adamw", lr=0.002, val_fraction=0.2, output=str(output))
    model = dict(model="resnet18_sugar_bsilu", model_args={"channels": [16, 16, 16, 16]})
    train(TrainConfig(data=parquet_folder, **model, **settings))
    return output
