"""The tail of a model's softmax, measured: the shares that a gradient filter at threshold eps keeps and drops.

Random activations say nothing about a filter: their probabilities are either all below the threshold or all above it.
`tail_curves.json` beside this file holds the curves of two real models (only statistics), to which
`calibrated.generate` was fitted; `python -m benchmarks curves` measures them again.
"""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_xent.models.packaged import PACKAGED
from hf_xent.ops import Head, vocab_stats

FILE = Path(__file__).with_name("tail_curves.json")
LOG2_EPS = range(-8, -21, -1)
EPS = tuple(2.0**k for k in LOG2_EPS)
CHUNKS = (256, 1023)  # tokens: the largest probability of a column grows with their number
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
TILE = 128  # tokens and columns of a block, as fused kernels tile the logits


@torch.no_grad()
def tail_curve(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    eps: tuple[float, ...] = EPS,
    chunk: int = 256,
) -> dict[str, list[float]]:
    """Three shares for each threshold, of the softmax of `hidden @ weight.T` in chunks of `chunk` tokens.

        columns: columns whose largest probability over the chunk exceeds eps, of V
        mass:    probability in the other columns, mean over tokens
        blocks:  blocks of TILE tokens and TILE columns that hold a probability above eps, of all

    Chunks are weighted by their tokens (the last may be shorter). Memory: TILE rows of logits.
    """
    totals = torch.zeros(2, len(eps), dtype=torch.float64)
    blocks = []
    for rows in hidden.split(chunk):
        tiles = [_tile(part, weight) for part in rows.split(TILE)]
        peak, total = torch.stack([p for p, _ in tiles]).amax(0), torch.stack([s for _, s in tiles]).sum(0)
        kept = [peak > e for e in eps]
        totals[0] += torch.tensor([k.double().mean() * len(rows) for k in kept])
        totals[1] += torch.tensor([total[~k].sum() for k in kept])
        for p, _ in tiles:
            inner = F.pad(p, (0, -len(p) % TILE)).view(-1, TILE).amax(1)
            blocks.append([float((inner > e).double().mean()) for e in eps])
    columns, mass = (totals / len(hidden)).tolist()
    return {"columns": columns, "mass": mass, "blocks": torch.tensor(blocks).mean(0).tolist()}


def _tile(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The largest probability of every column and, in float64, the sum over a few tokens, both [V]."""
    logits = F.linear(hidden, weight).float()
    p = logits.sub_(logits.logsumexp(-1, keepdim=True)).exp_()
    return p.amax(0), p.sum(0, dtype=torch.float64)


def spread(hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, dict[str, Any]]:
    """Mean and QUANTILES over tokens of the softmax's entropy and of -log p_label, in nats."""
    with torch.no_grad():
        stats = vocab_stats(hidden, Head(weight), labels, outputs=("lse", "target", "entropy"), impl="chunked")
    at = torch.tensor(QUANTILES)
    return {
        name: {"mean": float(x.mean()), "quantiles": x.quantile(at).tolist()}
        for name, x in (("entropy", stats.entropy.float()), ("nll", stats.nll.float()))
    }


@cache
def curves() -> dict[str, dict[str, Any]]:
    """The measured curves of `tail_curves.json`: model -> provenance, spread, and a curve for each of CHUNKS."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def measure(name: str, data: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """One entry of the file: curves and spread of the activations of a packaged model, and their provenance."""
    hidden, weight, labels = (tensors[key] for key in ("hidden", "weight", "labels"))
    package = PACKAGED[name].package
    return {
        "model": f"{name}, the GGUF of {package} {version(package)} as float32",
        "data": f"{data}, Python {platform.python_version()}",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "N": len(hidden),
        "V": len(weight),
        "D": weight.shape[1],
        "log2_eps": list(LOG2_EPS),
        "quantiles": QUANTILES,
        **_rounded(spread(hidden, weight, labels)),
        "curves": {str(chunk): _rounded(tail_curve(hidden, weight, chunk=chunk)) for chunk in CHUNKS},
    }


def text(value: Any, indent: str = "") -> str:
    """JSON with one line for every value without a dictionary inside it."""
    if not (isinstance(value, dict) and any(isinstance(x, dict) for x in value.values())):
        return json.dumps(value)
    lines = [f"{indent} {json.dumps(key)}: {text(x, indent + ' ')}" for key, x in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(x) for key, x in value.items()}
    return [_rounded(x) for x in value] if isinstance(value, list) else float(f"{value:.4g}")
