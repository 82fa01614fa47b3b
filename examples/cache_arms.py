"""The caches that `cache_perplexity.py` compares, flat, by age and of other libraries, and the bytes they hold."""

from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import Cache, DynamicCache, QuantizedCache

from hf_xent.caches import StaircaseCache
from hf_xent.experiments.study import Study
from hf_xent.system import figures

DENSE, STAIRCASE, RIVAL = "dense", "8,4,2", "2, residual 96"
PEER = {"q_group_size": 32, "residual_length": 64}
ARMS: dict[str, Any] = {
    DENSE: DynamicCache,
    "4": partial(StaircaseCache, bits=(4,), group=32, residual_length=64),
    "2": partial(StaircaseCache, bits=(2,), group=32, residual_length=64),
    RIVAL: partial(StaircaseCache, bits=(2,), group=32, residual_length=96),
    STAIRCASE: partial(StaircaseCache, bits=(8, 4, 2), group=32, residual_length=64),
    "4, group 64": partial(StaircaseCache, bits=(4,), group=64, residual_length=64),
    "8,4": partial(StaircaseCache, bits=(8, 4), group=32, residual_length=64),
    "fp8 of transformers": partial(QuantizedCache, "fp8"),
    **{f"HQQ {bits}": partial(QuantizedCache, "hqq", nbits=bits, axis_key=1, axis_value=1, **PEER) for bits in (4, 2)},
    **{f"Quanto {bits}": partial(QuantizedCache, "quanto", nbits=bits, **PEER) for bits in (4, 2)},
}
"""Arm -> function of the model's configuration, `config=`, that makes an empty cache."""


def installed(config: Any) -> list[str]:
    """The arms whose libraries are installed."""
    found = []
    for arm, make in ARMS.items():
        try:
            make(config=config)
        except ImportError:
            continue
        found.append(arm)
    return found


def held(value: Any) -> int:
    """Bytes of all tensors in nested containers; of a cache those of its layers, of a quantised tensor its parts'."""
    if hasattr(value, "__tensor_flatten__"):
        return sum(held(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    if isinstance(value, torch.Tensor | StaircaseCache):
        return value.nbytes
    if isinstance(value, Cache):
        return sum(held(vars(layer)) for layer in value.layers)
    if isinstance(value, dict | list | tuple):
        return sum(map(held, value.values() if isinstance(value, dict) else value))
    return 0


def plot(study: Study, path: Path) -> None:
    """Mean nats of every arm against its bytes."""
    figure, [axis] = figures.panels(1, 5, 3.5)
    for arm in study.results:
        point = tuple(mean(study.values(arm, metric).values()) for metric in ("bytes a token", "nats"))
        axis.plot(*point, "o")
        axis.annotate(arm, point, xytext=(4, 4), textcoords="offset points", fontsize=7)
    axis.set(xscale="log", xlabel="bytes of cache a token", ylabel="nats a token")
    figures.save(figure, path)
