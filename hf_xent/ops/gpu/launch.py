"""Whether Triton's kernels can be launched on a device.

That triton can be imported does not tell: to launch, it compiles a small library, for which slim containers lack the
compiler, and it does not support every GPU that torch does. One launch tells, of a kernel that takes no time.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch


@cache
def can_launch(device: torch.device) -> bool:
    """Whether kernels run on `device`, found by one launch; warns, once a device, if triton is there but does not work.

    The first call for a device waits for it. Without triton the answer is no, and there is no warning.
    """
    try:
        from .scaling import scale_unless_one_  # imported here: triton is optional, and slow to import
    except ImportError:
        return False
    two = torch.full((1,), 2.0, device=device)
    try:
        works = float(scale_unless_one_(two, two.clone())) == 4.0
        cause = "" if works else "the result of a first kernel is wrong"
    except Exception as error:  # whatever a compiler, a driver or a linker raises
        works, cause = False, f"{type(error).__name__}: {error}"
    if not works:
        warnings.warn(
            f"Triton cannot run a kernel on {device} ({cause}): slower operations of torch are used in its place."
            " Triton needs a C compiler, such as gcc, the headers of Python, a cache directory that can be written, and"
            " a GPU that it supports",
            RuntimeWarning,
            stacklevel=2,
        )
    return works
