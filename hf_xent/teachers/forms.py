"""How targets are written down: hidden states or the most probable tokens, as columns of numbers for each document.

    kind     dtype               columns beside input_ids, for a document of n tokens     bytes per token, ids included
    hidden   float16, float32    hidden [n, D]                                            2 D + 4, 4 D + 4
    hidden   int8                hidden [n, D], scale float32 [n]                         D + 8
    top_k    float16, float32    ids int32 [n, k], logp [n, k], rest float32 [n]          6 k + 8, 8 k + 8

int8 is round(h / (f scale)), where scale is the largest |h / f| of the position over 127, and f has a power of two for
each feature, since few features are many times larger than the others. Read back, it is h / f: the head that is written
beside it has its columns multiplied by f, which is exact. `rest` is the log-probability of all other tokens together;
NaN marks a position that the teacher has no opinion about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..options.ranges import check_number, is_integer

KINDS = {"hidden": ("float16", "int8", "float32"), "top_k": ("float16", "float32")}
"""Kind of targets -> the dtypes that it can be stored in."""
LARGEST_K = 1024


@dataclass(frozen=True)
class Form:
    """What is stored of a teacher.

    Args:
        kind: 'hidden' for hidden states, all of the distribution; 'top_k' for the k most probable tokens.
        k: How many tokens 'top_k' has, 1 to 1024.
        dtype: Of hidden states or log-probabilities: 'float16', 'float32', or 'int8' for hidden states.
        temperature: T of the softmax that the log-probabilities are of; hidden states serve any.

    Raises:
        ValueError: A field has another value, or an option has no effect on this kind.
    """

    kind: str = "top_k"
    k: int | None = None
    dtype: str = "float16"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}: choose {' or '.join(map(repr, KINDS))}")
        if self.dtype not in KINDS[self.kind]:
            raise ValueError(f"dtype is {self.dtype!r}: for {self.kind}, choose {' or '.join(KINDS[self.kind])}")
        check_number(self, "temperature", "(0, inf)", "choose a positive number")
        if self.kind == "hidden" and (self.k is not None or self.temperature != 1):
            name = "temperature" if self.k is None else "k"
            raise ValueError(f"{name} is {getattr(self, name)}, which hidden states do not depend on: leave it out")
        if self.kind == "top_k":
            object.__setattr__(self, "k", 64 if self.k is None else self.k)
            if not is_integer(self.k) or not 1 <= self.k <= LARGEST_K:  # type: ignore[operator]  # a number by now
                raise ValueError(f"k is {self.k!r}: choose a whole number from 1 to {LARGEST_K}")

    def width(self, features: int | None = None) -> int:
        """Numbers per token in the widest column: k, or the hidden size."""
        width = self.k if self.kind == "top_k" else features
        assert width is not None
        return width

    def bytes_per_token(self, features: int | None = None) -> int:
        """Size of a token in the cache, its id included, for hidden states of that many features."""
        return 4 + sum(
            np.dtype(dtype).itemsize * (self.width(features) if wide else 1) for dtype, wide in self.columns.values()
        )

    @property
    def columns(self) -> dict[str, tuple[str, bool]]:
        """Column -> its dtype, and whether a token has several numbers in it."""
        if self.kind == "top_k":
            return {"ids": ("int32", True), "logp": (self.dtype, True), "rest": ("float32", False)}
        scale = {"scale": ("float32", False)} if self.dtype == "int8" else {}
        return {"hidden": (self.dtype, True), **scale}

    def encoded(self, values: Mapping[str, np.ndarray], factors: np.ndarray | float = 1.0) -> dict[str, np.ndarray]:
        """The columns of tokens [n, ...], from float32 `hidden` [n, D], or from `ids`, `logp` and `rest`.

        Args:
            values: What the teacher says.
            factors: f of int8 [D].

        Raises:
            ValueError: Hidden states have no value in the dtype.
        """
        if self.kind == "top_k":
            return {name: values[name].astype(dtype) for name, (dtype, _) in self.columns.items()}
        hidden = values["hidden"]
        if self.dtype != "int8":
            if not np.isfinite(hidden).all() or np.abs(hidden).max(initial=0) > np.finfo(self.dtype).max:
                raise ValueError(f"dtype is {self.dtype!r}, which does not hold all hidden states: choose float32")
            return {"hidden": hidden.astype(self.dtype)}
        hidden = hidden / np.asarray(factors, np.float32)
        scale = np.maximum(np.abs(hidden).max(-1), np.float32(1e-30)) / np.float32(127)
        return {"hidden": np.rint(hidden / scale[:, None]).astype(np.int8), "scale": scale}

    def decoded(self, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What `encoded` was given, from its columns, up to rounding; of int8 it is h / f."""
        if self.kind == "hidden" and self.dtype == "int8":
            return {"hidden": columns["hidden"].astype(np.float32) * columns["scale"][:, None]}
        return dict(columns)

    def features(self, width: int) -> Any:
        """The columns of a cache as `datasets.Features`."""
        from datasets import Features, List, Value

        columns = {
            name: List(List(Value(dtype), length=width)) if wide else List(Value(dtype))
            for name, (dtype, wide) in self.columns.items()
        }
        return Features({"input_ids": List(Value("int32")), **columns})


def factors_of(hidden: np.ndarray) -> np.ndarray:
    """f of int8 [D], from hidden states [n, D]: the largest |h| of each feature, rounded up to a power of two.

    A feature that is small in these states gets not less than a thousandth of the largest one.
    """
    largest = np.abs(hidden).max(0).astype(np.float32)
    found: np.ndarray = np.exp2(np.ceil(np.log2(np.maximum(largest, max(float(largest.max()), 1e-30) / 1000))))
    return found.astype(np.float32)


def remaining(logp: np.ndarray) -> np.ndarray:
    """The log-probability of all tokens but those of logp [..., k] together, [...]; -inf if these have all mass."""
    with np.errstate(divide="ignore"):
        return np.log1p(-np.exp(logp.astype(np.float64)).sum(-1).clip(0, 1)).astype(np.float32)
