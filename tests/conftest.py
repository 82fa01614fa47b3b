"""Fixtures every test shares: where tests run, which backend answers, seeds, and poisoned memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are decorated, so before hf_xent.ops.streaming is imported
os.environ["HF_HUB_OFFLINE"] = "1"

IMPLS = ("reference", "chunked", "triton")
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def pytest_configure(config: pytest.Config) -> None:
    """Markers a run can leave out with -m."""
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "net: needs the network")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device there is."""
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
