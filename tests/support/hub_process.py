"""A process whose Hub is the one of `hub_server`: huggingface_hub reads its settings when it is imported."""

import os
import socket
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest

from .hub_server import Handler, serving

SETTINGS = {"OFFLINE": "0", "DISABLE_XET": "1", "DISABLE_TELEMETRY": "1"}


@dataclass
class Elsewhere:
    """The Hub, and the process that knows no other."""

    hub: object
    pool: ProcessPoolExecutor

    def run(self, function, *arguments, **options):
        """The result or the error of a function, run there."""
        return self.pool.submit(function, *arguments, **options).result()

    def files(self, repo_id, kind="models", branch="main"):
        return self.hub.repos[f"{kind}/{repo_id}"].branches[branch]


def only_here():
    """Connections to anything but this machine are errors, and code that other tests have loaded is not found."""
    sys.path[:] = [path for path in sys.path if not (Path(path) / "transformers_modules").is_dir()]
    real = socket.socket.connect

    def connect(self, address):
        assert address[0] == "127.0.0.1", f"tried to reach {address}"
        real(self, address)

    socket.socket.connect = connect


def environment(server, home, token="hf_of_the_test", xet=False, **more):
    """The variables with which a process knows the Hub at this server, and no other."""
    found = {f"HF_HUB_{name}": value for name, value in SETTINGS.items()} | {"HF_HUB_DISABLE_XET": str(int(not xet))}
    return found | {"HF_ENDPOINT": server.url, "HF_HOME": str(home)} | ({"HF_TOKEN": token} if token else {}) | more


@contextmanager
def elsewhere(home, handler=Handler, **options):
    """A running Hub and a process for it; the options are those of `environment`."""
    with serving(handler) as server, pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_TOKEN", raising=False)
        for name, value in environment(server, home, **options).items():
            patch.setenv(name, value)
        with ProcessPoolExecutor(1, get_context("spawn"), only_here) as pool:
            pool.submit(os.getpid).result()  # it has started, with this environment
            patch.undo()
            yield Elsewhere(server, pool)
