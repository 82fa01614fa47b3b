"""The additional memory that a block of code needs: `PeakMemory`. Importing this file imports neither torch nor numpy.

CUDA: the peak that the allocator records. Linux: the peak that the kernel records (VmHWM), reset by writing 5 to
/proc/self/clear_refs, so that no allocation is missed. Elsewhere: a thread reads the resident set every millisecond.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from pathlib import Path
from typing import Any, Protocol, Self

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


class PeakMemory:
    """Context manager; after the block, `peak` is the peak memory in use, `extra` its increase from the start, bytes.

        with PeakMemory() as memory:
            loss.backward()
        print(memory.extra >> 20, "MiB")

    Memory that the block leaves allocated counts: subtract it to get the transient part.

    Args:
        device: A device or its name, as in torch. For all but CUDA, the memory of this process with all threads counts.
    """

    def __init__(self, device: Any = "cpu"):
        self.peak = self.extra = 0
        self._meter = _meter(str(device))

    def __enter__(self) -> Self:
        gc.collect()
        self._before = self._meter.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = self._meter.stop()
        self.extra = max(0, self.peak - self._before)


class _Meter(Protocol):
    def start(self) -> int:
        """Bytes in use now; the peak is counted from here."""
        ...

    def stop(self) -> int:
        """Peak of bytes in use since `start`."""
        ...


def _meter(device: str) -> _Meter:
    if device.startswith("cuda"):
        return _Cuda(device)
    try:
        CLEAR_REFS.write_text("5")
    except OSError:  # not Linux, or a sandbox that forbids it
        return _Sampler()
    return _Kernel()


class _Cuda:
    def __init__(self, device: str):
        import torch  # lazy: a measurement on CUDA has it loaded anyway

        self.cuda, self.device = torch.cuda, device

    def start(self) -> int:
        self.cuda.synchronize(self.device)
        self.cuda.reset_peak_memory_stats(self.device)
        return self.cuda.memory_allocated(self.device)

    def stop(self) -> int:
        self.cuda.synchronize(self.device)
        return self.cuda.max_memory_allocated(self.device)


class _Kernel:
    def start(self) -> int:
        _trim()
        CLEAR_REFS.write_text("5")
        return self.stop()  # VmHWM and not VmRSS, so that both readings come from one counter

    def stop(self) -> int:
        [line] = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) << 10


class _Sampler:
    def start(self) -> int:
        import psutil

        _trim()
        self.process, self.done = psutil.Process(), threading.Event()
        self.peak = before = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return before

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def stop(self) -> int:
        self.done.set()
        self.thread.join()
        return max(self.peak, self.process.memory_info().rss)


def _trim() -> None:
    """Return freed heap to the system, so that later allocations count as growth (only glibc has this call)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_bytes(device: str) -> int:
    """Bytes free on the device, 'cpu' or 'cuda'."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    import psutil

    return int(psutil.virtual_memory().available)


def return_large_blocks(threshold: int = 1 << 20) -> None:
    """From now on, return freed blocks of more than `threshold` bytes to the system (only glibc has this call).

    By default glibc may keep freed blocks of up to 32 MiB in its heap, where the gaps between those still in use count
    as memory of the process; with activation checkpointing they can outweigh all activations.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(-3, threshold)  # M_MMAP_THRESHOLD of malloc.h
