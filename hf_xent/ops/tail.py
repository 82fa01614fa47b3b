"""The sparse tail: exact gradients of the vocabulary columns that matter, all others compressed to rank one.

A trained model puts almost all of its softmax on few columns. For losses of log p_y alone, dz = a (p - r 1_y), and

    kept columns K    the labels' and the largest by energy_j = sum_t (a_t p_tj)^2, such that the columns left out hold
                      at most tolerance^2 of sum |dz|^2
    the tail          p_tj ~ r_t q_gj    r_t = 1 - sum_K p_tj    q_gj ~ sum_{t in g} |a_t| p_tj    sum_j q_gj = 1

for each of a few groups g of consecutive tokens, so that every row of dz keeps its sum: probability mass is moved
inside the tail, never dropped. Then dh_t gains a_t r_t (q_g W) and dW_j gains q_gj (sum_g a_t r_t h_t).

One visit of all logits (`survey`) gives statistics, energies and the tail's masses; the logits of K are computed again
for the gradients. With k = |K| / V that is 1 + 3k matmuls of the full size, where dense torch needs 3.

Bound: |dz - dz'| <= tolerance |dz| (Frobenius) before the tail is put back. On two real models the hidden gradient's
error came out 2 to 8 times the tolerance and the weight gradient's 1.4 to 1.5 times (benchmarks/results/tail.md); with
the same columns left out instead, both err 2 to 7 times as much. At 1e-3 both are below the rounding of bfloat16.
Of a head that is split over ranks, every rank knows the energies of all columns and compresses its own; q is one over
all of them.
Columns, not tiles: of Gemma's columns 7 % hold any probability above 2^-14, but 61 % of its tiles of 128 x 128 logits
do (benchmarks/tail_curves.json), so that skipping tiles saves little.
Source: this project; leaving small entries out is from Wijmans et al. 2024, Cut Your Losses, arXiv:2411.09009, 4.3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from .algebra import Coefficients, row_factor
from .matmul import add_hidden_gradient, add_matrix_gradient, add_scaled_gradient
from .panels import Scaled
from .problem import TENSORS, Problem, Upstream, pieces
from .ranks import sum_over_ranks
from .shard import gather_from_ranks
from .statistics import wide

GROUPS = 16  # groups of tokens, each with its own tail: [16, V] floats, however many tokens there are


@dataclass(frozen=True)
class Survey:
    """What the sparse tail needs to know from one visit of all logits."""

    values: dict[str, Tensor]  # statistics, [N] each
    coef: Coefficients  # plain, [N] each
    energy: Tensor  # [V] sum_t (a_t p_tj)^2, in units of the largest a^2
    mass: Tensor  # [groups, V] sum_t |a_t| p_tj, in units of the largest |a|


def eager(backend: ModuleType, problem: Problem, upstream: Upstream) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Statistics and gradients of a sum of losses of log p_y, the gradients up to an error of `problem.tail`."""
    groups = pieces(len(problem.labels), max(1, -(-len(problem.labels) // GROUPS)))
    survey: Survey = backend.survey(problem, upstream, groups)
    kept = select_columns(survey, problem)
    if (
        len(kept) > problem.head.vocabulary // 2
    ):  # nothing would be saved: the entropy is high, or the tolerance is tight
        return survey.values, backend.backward(problem, survey.values, _upstream(survey.coef))
    start = 0 if problem.head.shard is None else problem.head.shard.start
    local = kept[(kept >= start) & (kept < start + problem.head.size)] - start  # of this rank
    return survey.values, _gradients(backend, problem, survey, groups, local)


def select_columns(survey: Survey, problem: Problem) -> Tensor:
    """The columns of the whole vocabulary to keep, ascending."""
    coef, values = survey.coef, survey.values
    energy, order = gather_from_ranks(survey.energy.double(), problem.head.shard).sort()
    unit = coef.a.abs().amax()
    a, o = coef.a / unit, coef.o / unit
    # |dz|^2 of a row: the energy of a p, but the label's entry is a p_y + o
    total = energy.sum() + (2 * a * o * (values["target"] - values["lse"]).exp() + o**2).sum()
    negligible = _sums_at_most(energy, problem.tail**2 * total)
    keep = torch.ones_like(negligible)
    keep[order] = ~negligible
    keep[problem.labels] = True
    return keep.nonzero().squeeze(-1)


def _sums_at_most(energy: Tensor, bound: Tensor) -> Tensor:
    """Which running sums of `energy` [V] >= 0 are at most `bound`, both float64; none from a NaN on, or if that is one.

    The sums are of integers, in units of 2^-40 of the bound: those of floats have no fixed order on a GPU, which torch
    refuses under `use_deterministic_algorithms`. A term counts as twice the bound at most, so that no sum of fewer than
    2^22 terms overflows; the roundings of so many are at most two millionths of the bound together.
    """
    unit = 2.0**40
    tiny = torch.finfo(energy.dtype).tiny  # a bound of 0 is kept by terms of 0 alone
    terms = (energy / bound.clamp(min=tiny) * unit).clamp(max=2 * unit).nan_to_num(nan=2 * unit)
    return terms.round().long().cumsum(0) <= unit


def _upstream(coef: Coefficients) -> dict[str, Tensor]:
    """The upstream gradients that have these coefficients."""
    return {"lse": coef.a, "target": coef.o}


def _gradients(
    backend: ModuleType, problem: Problem, survey: Survey, groups: list[slice], kept: Tensor
) -> dict[str, Tensor]:
    """The gradients from this rank's kept columns, whose logits are computed a piece at a time, and from the tail."""
    head, tensors = replace(problem.head, shard=None), dict(zip(TENSORS, problem.tensors, strict=True))
    sums: dict[str, Tensor] = {}
    for name in problem.needs:
        tensor = tensors[name]
        assert tensor is not None
        dtype = tensor.dtype if name in head.matrices else wide(tensor.dtype)
        sums[name] = torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
    share = survey.values["lse"].new_zeros(len(problem.labels))
    new_column = problem.labels.new_full((head.size,), -1)
    new_column[kept] = torch.arange(len(kept), device=kept.device)
    labels = torch.where(problem.label_columns == problem.readable_columns, new_column[problem.readable_columns], -1)
    # a third of the budget each for a piece's rows of the head, their gradient, and its logits
    row = head.weight.shape[1] * head.weight.element_size()
    for piece in pieces(len(kept), max(1, problem.memory_budget // (3 * row))):
        columns = kept[piece]
        part = replace(
            problem, head=head[columns], labels=labels - piece.start, memory_budget=max(1, problem.memory_budget // 3)
        )
        for name, grad in backend.backward(part, survey.values, _upstream(survey.coef), share).items():
            if name == "hidden":
                sums[name] += grad
            else:
                sums[name][columns] = grad.to(sums[name].dtype)
    share = sum_over_ranks(share, problem)
    _add_tail(problem, survey, groups, kept, (1 - share).clamp_(min=0), sums)
    return {name: total.to(tensors[name].dtype) for name, total in sums.items()}  # type: ignore[union-attr]


def _add_tail(
    problem: Problem, survey: Survey, groups: list[slice], kept: Tensor, mass: Tensor, sums: dict[str, Tensor]
) -> None:
    """Add the tail, of rank one per group, to `sums`; `mass` [N] is each token's softmax mass in the tail."""
    q = survey.mass  # overwritten: it becomes the tail's distributions, each divided by its largest entry
    q[:, kept] = 0
    peak, total = q.amax(-1, keepdim=True), sum_over_ranks(q.sum(-1, keepdim=True), problem)
    q /= torch.where(peak > 0, peak, 1.0)
    scale = torch.where(peak > 0, peak / total, 0.0)  # [groups, 1]
    no_softmax, dtype = survey.coef.a == 0, problem.hidden.dtype
    factor = torch.where(no_softmax, 0.0, mass)[:, None] * row_factor(survey.coef, problem.head)  # [N, 1]
    if "hidden" in sums:
        centers = torch.zeros(len(groups), problem.head.features, dtype=q.dtype, device=q.device)
        for matrix, features in problem.head.matrices.values():
            add_hidden_gradient(centers[:, features], q.to(dtype), matrix, first=True)
        centers *= scale
        for group, center in zip(groups, centers, strict=True):
            sums["hidden"][group] += factor[group] * center
    if sums.keys() & {"gain", *problem.head.matrices}:
        weighted = torch.stack([(factor[group] * problem.hidden[group]).sum(0) for group in groups])
        weighted = (weighted * scale).to(dtype)
        for name, (matrix, features) in problem.head.matrices.items():
            if isinstance(matrix, Scaled):
                totals = sums.get(name), sums.get("gain")
                add_scaled_gradient(*totals, q.to(dtype), weighted[:, features], matrix, first=False)
            elif name in sums:
                add_matrix_gradient(sums[name], q.to(dtype), weighted[:, features], first=False)
    if "bias" in sums:
        sums["bias"] += q.T @ (torch.stack([factor[group].sum() for group in groups]) * scale.squeeze(-1))
