"""Fixtures every test shares: where tests run, which backend answers, seeds, and poisoned memory."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are decorated, before hf_xent.ops.gpu is imported
os.environ["HF_HUB_OFFLINE"] = "1"
# read when trackio is imported, which other libraries do: its database is not that of the user
os.environ["TRACKIO_DIR"] = os.path.join(tempfile.mkdtemp(prefix="trackio-"), "trackio")

IMPLS = ("reference", "chunked", "triton")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ("cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU]))

# What the package's extras bring, by the names that are imported: `make venv` installs all of it.
EXTRAS = ("accelerate", "datasets", "evaluate", "matplotlib", "peft", "psutil", "scipy", "sklearn", "trl")


@pytest.fixture
def without_progress_bars() -> Iterator[None]:
    """Nothing is drawn while data sets are prepared."""
    import datasets

    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A file that imports a missing extra is skipped: the kernels' tests need torch and transformers alone."""
    report = yield
    cause = report.call.excinfo.value if report.failed and report.call.excinfo else None  # type: ignore[attr-defined]
    while cause is not None:
        name = (getattr(cause, "name", None) or "").partition(".")[0]
        if isinstance(cause, ModuleNotFoundError) and name in EXTRAS and find_spec(name) is None:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"Skipped: needs {name}, which is not installed")
        cause = cause.__cause__ or cause.__context__
    return report


@pytest.fixture(autouse=True)
def offline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but this machine is spoken to, unless a test is marked `net`: a connection elsewhere is an error."""
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        here = self.family == socket.AF_UNIX or str(address[0]) in ("127.0.0.1", "::1", "localhost")
        assert here, f"a test tried to reach {address}"
        real(self, address)

    if request.node.get_closest_marker("net") is None:
        monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device there is."""
    return request.param


@pytest.fixture(params=DEVICES[1:])
def gpu(request: pytest.FixtureRequest) -> str:
    """A CUDA device, for what no other device can do; a test that asks for it runs nowhere else."""
    return request.param


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest, device: str) -> str:
    """Every backend; Triton is compiled where there is a GPU and interpreted where there is none."""
    if request.param == "triton" and device == "cpu" and torch.cuda.is_available():
        pytest.skip("with a GPU the Triton kernels are compiled: they do not run on the CPU")
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same numbers in every run of a test."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninitialized floats that hf_xent.ops asks for are NaN: reading one before writing it fails the test."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    yield


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return out.fill_(float("nan")) if caller.startswith("hf_xent.ops") and out.is_floating_point() else out

    return poisoned
