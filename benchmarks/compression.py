"""Gradient errors of the sparse tail, compared with those of dropping the same columns and of bfloat16 rounding."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_xent.bench.config import BenchConfig
from hf_xent.bench.inputs import activations
from hf_xent.bench.rows import PACKAGES, environment
from hf_xent.losses import CrossEntropy
from hf_xent.ops import Head, chunked
from hf_xent.ops.problem import Problem
from hf_xent.ops.tail import select_columns

TAILS = (1e-2, 3e-3, 1e-3, 5e-4, 3e-4, 1e-4)
CHUNK = 256  # tokens of dense logits at a time
PAGE = """\
# The sparse tail: error of the gradients

Made by `python -m benchmarks tail`; {facts}.

Mean cross-entropy of next tokens, {tokens} tokens, float32. `tail` bounds the relative error of the logits' gradient
(Frobenius norm) before the tail is put back; `columns` is the share of the vocabulary kept. Errors are those of the
hidden and of the weight gradient relative to dense torch's: with the tail compressed to rank one, with the same columns
kept and the tail dropped, and how many times worse that is. Token errors are of single rows of the hidden gradient. The
last line is dense torch in bfloat16.
"""
COLUMNS = (
    "tail",
    "columns",
    "hidden grad",
    "dropped",
    "times",
    "weight grad",
    "dropped",
    "times",
    "median token",
    "worst token",
)


def page(configs: list[BenchConfig]) -> str:
    """A Markdown page with one table for each config's activations."""
    measured_on = environment("cpu", torch.get_num_threads())
    facts = ", ".join(f"{name} {measured_on[name]}" for name in PACKAGES if measured_on[name])
    facts = f"{facts}, commit {measured_on['commit']}, {measured_on['date'][:10]}"
    parts = [PAGE.format(facts=facts, tokens=configs[0].tokens)]
    for config in configs:
        tensors, source = activations(config), f"{config.model} on {config.data}"
        head = f"| {' | '.join(COLUMNS)} |\n|{' ---: |' * len(COLUMNS)}\n"
        shape = f"V={len(tensors['weight'])}, D={tensors['weight'].shape[1]}"
        parts.append(f"## {source}: {shape}\n\n{head}{''.join(_lines(**tensors))}")
    return "\n".join(parts)


def _lines(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[str]:
    all_columns = torch.arange(len(weight))
    exact = _dense(hidden, weight, labels, all_columns)
    problem = Problem(hidden, Head(weight), labels, frozenset({"lse", "target"}), memory_budget=256 << 20)
    ones = torch.ones(len(labels))
    survey = chunked.survey(
        problem, lambda rows, values: {"lse": ones[rows], "target": -ones[rows]}, [slice(0, len(labels))]
    )
    lines = []
    for tail in TAILS:
        kept = select_columns(survey, replace(problem, tail=tail))
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        CrossEntropy()(h, Head(w), labels, tail=tail).backward()
        assert h.grad is not None and w.grad is not None
        lines.append(
            _line(f"{tail:g}", len(kept) / len(weight), (h.grad, w.grad), exact, _dense(hidden, weight, labels, kept))
        )
        del h, w
    h, w = (x.bfloat16().requires_grad_() for x in (hidden, weight))
    F.cross_entropy(F.linear(h, w), labels).backward()
    assert h.grad is not None and w.grad is not None
    return [*lines, _line("bfloat16", 1.0, (h.grad.float(), w.grad.float()), exact, None)]


@torch.no_grad()
def _dense(hidden: Tensor, weight: Tensor, labels: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of dense torch to which only the columns `kept` contribute."""
    dh, dw = torch.empty_like(hidden), torch.zeros_like(weight)
    is_kept = torch.zeros(len(weight), dtype=torch.bool)
    is_kept[kept] = True
    for i in range(0, len(hidden), CHUNK):
        h, y = hidden[i : i + CHUNK], labels[i : i + CHUNK]
        dz = F.linear(h, weight).softmax(-1)
        dz[torch.arange(len(y)), y] -= 1
        dz.mul_(is_kept).div_(len(labels))
        dh[i : i + CHUNK] = dz @ weight
        dw.addmm_(dz.T, h)
    return dh, dw


def _line(
    name: str,
    columns: float,
    gradients: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
    dropped: tuple[Tensor, Tensor] | None,
) -> str:
    cells = [name, f"{columns:.1%}"]
    for i, truth in enumerate(exact):
        error = _error(gradients[i], truth)
        dropped_error = None if dropped is None else _error(dropped[i], truth)
        cells += [
            f"{error:.1e}",
            *(("", "") if dropped_error is None else (f"{dropped_error:.1e}", f"{dropped_error / error:.1f}")),
        ]
    tokens = (gradients[0] - exact[0]).norm(dim=-1) / exact[0].norm(dim=-1)
    return f"| {' | '.join([*cells, f'{tokens.median():.1e}', f'{tokens.max():.1e}'])} |\n"


def _error(gradient: Tensor, truth: Tensor) -> float:
    return float((gradient - truth).norm() / truth.norm())
