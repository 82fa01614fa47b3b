"""Known remarks of libraries while they load are silenced at their source, one by one, so that others appear."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


@contextmanager
def quiet_loading() -> Iterator[None]:
    """A context without remarks on unused features, and without progress bars in processes that are started."""
    import torch

    already_set = set(os.environ)
    os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it on import, which happened here with torch
    if find_spec("deepspeed") and not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed, which warns if it finds no GPU
    # it recommends a compiled kernel for 4-bit models, whatever the model is
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():  # PEFT reads the property that transformers deprecates
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            # TRL's configurations set it by default under the name of before transformers 6
            warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "`gradient_checkpointing_(en|dis)able` is deprecated", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
        for name in {"TQDM_DISABLE", "DS_ACCELERATOR"} - already_set:
            os.environ.pop(name, None)


@contextmanager
def without_load_report() -> Iterator[None]:
    """Without the report of weights that are new, which those of a head are meant to be."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
