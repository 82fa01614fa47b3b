"""What libraries say while they load, silenced at its source and one by one, so that every other warning appears."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Within: no remarks of libraries on what is not used; and no bars of theirs in processes that are started."""
    import torch

    before = set(os.environ)
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: here that was with torch
    if find_spec("deepspeed") and not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed, which warns if it finds no GPU
    # asks for a compiled kernel for 4-bit models, whatever the model
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():  # of PEFT's question to transformers
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
        for name in {"TQDM_DISABLE", "DS_ACCELERATOR"} - before:
            os.environ.pop(name, None)
