"""The settings of a plan, each with its help and its range, and the memory of GPUs by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Self

from ..experiments.fields import option
from ..options.ranges import check_count, check_fields

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
GPUS = {
    "T4": 16,
    "L4": 24,
    "A10G": 24,
    "RTX3090": 24,
    "RTX4090": 24,
    "RTX5090": 32,
    "V100": 32,
    "A100-40": 40,
    "L40S": 48,
    "A6000": 48,
    "A100-80": 80,
    "H100": 80,
    "H200": 141,
    "B200": 180,
}
"""Name -> GB of memory, as its maker calls it."""
USABLE = 0.93
"""The share of a GPU's memory that a plan gives out: the rest is for the CUDA context and fragmentation."""
OPTIMIZERS = ("adamw", "adamw_8bit", "sgd", "adafactor")


@dataclass(frozen=True)
class Settings:
    """What is trained, and how; each field is an option of `hf-xent plan`.

    Raises:
        ValueError: From `checked`: a field is out of its range, or has no effect beside the others.
    """

    model: Any = field(
        metadata={"help": "The model: 'smollm2' (packaged, offline), or a Hub id or path: its config.json is read."}
    )
    tokens: int = option("Tokens of a forward pass on one device: sequences times their length.", 8192, min=2)
    sequence_length: int | None = option("Tokens of a sequence [default: 2048, or fewer].", None)
    dtype: str = option("Of weights and products: bf16, fp16 or fp32, or torch's names of them.", "bf16")
    mixed_precision: bool = option("Keep weights in float32, and multiply in the dtype (autocast).", False)
    optimizer: str = option(f"One of {', '.join(OPTIMIZERS)}.", "adamw")
    gradient_checkpointing: bool = option("Compute activations of layers again in the backward pass.", False)
    accumulation: int = option("Forward passes per optimizer step; with several, gradients stay.", 1, min=1)
    peft: str | None = option("'lora': adapters on all linear layers but the head, the rest frozen.", None)
    lora_rank: int = option("Rank of the adapters of --peft lora.", 16, min=1)
    four_bit: bool = option("Keep the frozen linear layers in 4 bits, as bitsandbytes; needs --peft.", False)
    attention: str = option("Kernels of attention: 'sdpa' ('flash' is the same here), or 'eager'.", "sdpa")
    devices: int = option("Devices that train on a batch each.", 1, min=1)
    zero_stage: int = option(
        "What devices split, as ZeRO counts: 1 optimizer, 2 gradients, 3 weights.", 0, min=0, max=3
    )
    tail: float = option("The tail of hf_xent, as of `hf-xent train`; 0 is exact.", 0.0)
    memory_budget: int | None = option("Bytes of logits of hf_xent at a time [default: as in training].", None)
    gpu: str | None = option(f"A GPU to fill: a number of GB, or {', '.join(GPUS)}.", None)
    device: str = option("'cuda', or 'cpu' for a step on a CPU.", "cuda")

    def checked(self) -> Self:
        """The same settings in torch's names. Raises: ValueError."""
        check_fields(self, {"tail": "[0, 1)"})
        for name in ("tokens", "accumulation", "lora_rank", "devices"):
            check_count(name, getattr(self, name), 2 if name == "tokens" else 1)
        for name in ("sequence_length", "memory_budget"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)
        dtype, attention = DTYPES.get(self.dtype, self.dtype), self.attention.replace("flash", "sdpa")
        self._check_choice("dtype", dtype, tuple(DTYPES.values()))
        self._check_choice("attention", attention, ("sdpa", "eager"))
        self._check_choice("optimizer", self.optimizer, OPTIMIZERS)
        self._check_choice("peft", self.peft, (None, "lora"))
        self._check_choice("device", self.device, ("cuda", "cpu"))
        self._check_choice("zero_stage", self.zero_stage, (0, 1, 2, 3))
        self._check_effect(dtype)
        gpu_bytes(self.gpu)
        return replace(self, dtype=dtype, attention=attention)

    def _check_choice(self, name: str, value: Any, choices: tuple[Any, ...]) -> None:
        if value not in choices:
            raise ValueError(
                f"{name} is {getattr(self, name)!r}: choose {', '.join(map(str, choices[:-1]))} or {choices[-1]}"
            )

    def _check_effect(self, dtype: str) -> None:
        """Raises: ValueError for an option that would have no effect."""
        if self.mixed_precision and dtype == "float32":
            raise ValueError("mixed_precision is True and dtype float32, which casts nothing: choose bf16 or fp16")
        if self.four_bit and self.peft is None:
            raise ValueError("four_bit is True without peft, but 4-bit weights cannot be trained: choose peft='lora'")
        if self.zero_stage and self.devices == 1:
            raise ValueError(
                f"zero_stage is {self.zero_stage} with one device, which has none to split with: choose more devices"
            )
        if self.sequence_length is not None and self.sequence_length > self.tokens:
            raise ValueError(
                f"sequence_length is {self.sequence_length}, more than the {self.tokens} tokens: choose at most that"
            )


def gpu_bytes(gpu: str | float | None) -> int | None:
    """The bytes of a GPU's memory that can be used, by its name or its GB; None without one.

    Raises: ValueError for an unknown name.
    """
    if gpu is None:
        return None
    names = {name.replace("-", "").lower(): size for name, size in GPUS.items()} | {"a100": 80}
    key = str(gpu).lower().replace("-", "").replace(" ", "").removesuffix("gb")
    try:
        size = float(names.get(key, key))
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise ValueError(f"gpu is {gpu!r}: give a number of GB, or one of {', '.join(GPUS)}")
    return int(size * 2**30 * USABLE)
