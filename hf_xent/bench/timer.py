"""The time of calls on a device: `time_calls`."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def time_calls(call: Callable[[], object], repeats: int, device: str) -> list[float]:
    """Seconds of each of several calls, one after the other: on CUDA by its events, elsewhere by the clock."""
    return [(_by_events if device == "cuda" else _by_clock)(call) for _ in range(repeats)]


def _by_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _by_events(call: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3
