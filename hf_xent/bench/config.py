"""The settings of a benchmark: `BenchConfig`, and the names of the inputs that it can choose."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from .contestants import BASE, CONTESTANTS
from .objectives import OBJECTIVES, PLAIN

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RANDOM = "random"
CALIBRATED = "calibrated"  # alone, or followed by ':' and the model that it is calibrated to
SHAPED = (CALIBRATED, RANDOM)  # generated inputs of a chosen shape, given in place of a model
EXPORTED = ".safetensors"  # the suffix of files with the activations of a model


def shaped(source: str) -> bool:
    """Whether a config's model, or a row's source, is one of SHAPED, alone or followed by more words."""
    return re.split("[: ]", source)[0] in SHAPED


@dataclass(frozen=True)
class BenchConfig:
    """The inputs of a benchmark, its contestants, and how often they run.

    Raises:
        ValueError: For an unknown dtype, device, objective or contestant, and for numbers below 1.
    """

    model: str = "smollm2"
    """The model whose activations are used: 'smollm2' (packaged), a Hub id, a path, or a file that
    `inputs.write_activations` wrote. Or inputs of a chosen shape: 'calibrated' ('calibrated:smollm2'), whose softmax
    has the peaks and the tail of that of a real model, or 'random'."""
    data: str = "pydoc"
    """The text that the activations are computed on: any source of `hf_xent.data.load_text`."""
    tokens: int = 1024
    """Number of tokens, N."""
    vocab: int = 4096
    """Vocabulary V of 'random' and 'calibrated'."""
    width: int = 64
    """Hidden size D of 'random' and 'calibrated'."""
    dtype: str = "float32"
    """'float32', 'bfloat16' or 'float16'."""
    objective: str = PLAIN
    """What is minimized, a name among OBJECTIVES; contestants that do not have it are left out."""
    contestants: tuple[str, ...] = ()
    """Names among CONTESTANTS; empty for all. 'dense' always runs, since the others are compared with it."""
    repeats: int = 10
    """Timed iterations of each contestant."""
    warmup: int = 2
    """Untimed iterations before them."""
    patience: float = 60.0
    """Seconds after which a contestant with 3 timed iterations is not timed any further; in a shared process, after
    which it is given up."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """'cpu' or 'cuda'."""
    threads: int = field(default_factory=torch.get_num_threads)
    """Threads of torch in every contestant's process."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}: choose 'cpu' or 'cuda'")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective is {self.objective!r}: choose one of {', '.join(OBJECTIVES)}")
        if unknown := [name for name in self.contestants if name not in CONTESTANTS]:
            raise ValueError(f"no contestant {unknown[0]!r}: choose among {', '.join(CONTESTANTS)}")
        for name in ("tokens", "vocab", "width", "repeats", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a positive number")

    @property
    def shape(self) -> str:
        """A short description of the inputs."""
        chosen = f", V={self.vocab}, D={self.width}" if shaped(self.model) else ""
        other = "" if self.objective == PLAIN else f", {self.objective}"
        return f"{self.model}, {self.dtype}, N={self.tokens}{chosen}{other}"

    @property
    def names(self) -> list[str]:
        """The contestants that have the objective, in the registry's order; dense is always among them."""
        chosen = [name for name in CONTESTANTS if name == BASE or not self.contestants or name in self.contestants]
        return [name for name in chosen if CONTESTANTS[name].method(self.objective) is not None]
