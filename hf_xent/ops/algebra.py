"""How a row of logits is folded into the statistics of its softmax, and the backward that they all share.

A token's row of logits is folded into a `State`, a monoid under `merge`; `finish` turns it into statistics. Their
upstream gradients become six numbers per token (`coefficients`), from which every backend computes

    dz[t,j] = p_tj (a_t + b_t logp + c_t logp^2 + d_t pay_tj) + s_t w_j + o_t 1[j = y_t]

with w_j = 1 unless the statistic `mean` is weighted. Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..system import renamed
from .head import Head


@dataclass(frozen=True)
class State:
    """The moments of rows of logits about their running maximum m, [N] each, with u = z - m.

    A moment is None where no requested statistic needs it.
    """

    m: Tensor  # max z
    l: Tensor  # sum e^u
    s1: Tensor | None = None  # sum e^u u
    s2: Tensor | None = None  # sum e^u u^2
    sp: Tensor | None = None  # sum e^u pay
    sq: Tensor | None = None  # sum e^2u
    sz: Tensor | None = None  # sum z
    top: Tensor | None = None  # arg max
    rank: Tensor | None = None  # count of z > z_y


def merge(x: State, y: State) -> State:
    """The state of two disjoint parts of the same rows, such as tiles or splits of a grid; merging is associative.

    Args:
        x: The state of some columns. An empty part has m = -inf and zero sums.
        y: The state of other columns of the same rows.

    Returns:
        The state of the columns of both parts. A moment that either part lacks is None; ties of the maximum go to `x`.
    """
    m = torch.maximum(x.m, y.m)
    x_centered, y_centered = _recenter(x, m), _recenter(y, m)
    summed: dict[str, Any] = {
        f.name: _add(getattr(x_centered, f.name), getattr(y_centered, f.name))
        for f in fields(State)
        if f.name not in ("m", "top")
    }
    top = None if x.top is None or y.top is None else torch.where(x.m >= y.m, x.top, y.top)
    return State(m=m, top=top, **summed)


def _add(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """The sum, or None if one of the two is None."""
    return None if x is None or y is None else x + y


def _recenter(x: State, m: Tensor) -> State:
    """Moments about a larger maximum m: with d = x.m - m, l' = e^d l, s1' = e^d (s1 + d l), and so on."""
    delta = torch.where(x.m == m, 0.0, x.m - m).clamp(min=-1e4)  # finite for an empty part, whose factor is 0
    factor = torch.where(x.m == float("-inf"), 0.0, delta.exp())
    s1 = None if x.s1 is None else factor * (x.s1 + delta * x.l)
    s2 = None if x.s2 is None or x.s1 is None else factor * (x.s2 + 2 * delta * x.s1 + delta**2 * x.l)
    sp = None if x.sp is None else factor * x.sp
    sq = None if x.sq is None else factor**2 * x.sq
    return replace(x, m=m, l=factor * x.l, s1=s1, s2=s2, sp=sp, sq=sq)


def finish(state: State, target: Tensor, size: int) -> dict[str, Tensor]:
    """Statistics [N] of rows that are folded completely, over a vocabulary of `size` tokens."""
    log_l = state.l.log()
    values = {"lse": state.m + log_l, "target": target}
    if state.sz is not None:
        values["mean"] = state.sz / size
    if state.s1 is not None:
        values["entropy"] = log_l - state.s1 / state.l
    if state.s2 is not None and state.s1 is not None:
        values["variance"] = state.s2 / state.l - (state.s1 / state.l) ** 2
    if state.sp is not None:
        values["payload"] = state.sp / state.l
    if state.sq is not None:
        values["log_sum_sq"] = state.sq.log() - 2 * log_l
    for name in ("top", "rank"):
        if getattr(state, name) is not None:
            values[name] = getattr(state, name)
    return values


@dataclass(frozen=True)
class Coefficients:
    """The backward of any loss as six numbers per token, [N] each; None stands for zeros. See the module for dz.

    `w` has one number per column of the tile instead, and None stands for ones.
    """

    a: Tensor
    o: Tensor
    b: Tensor | None = None
    c: Tensor | None = None
    d: Tensor | None = None
    s: Tensor | None = None
    w: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether dz is p scaled row by row plus one entry per row, as for every function of log p_y."""
        return self.b is None and self.c is None and self.d is None and self.s is None

    def __getitem__(self, rows: slice) -> Coefficients:
        """The coefficients of some tokens."""
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "w"}
        sliced: dict[str, Any] = {name: None if x is None else x[rows] for name, x in numbers.items()}
        return Coefficients(**sliced, w=self.w)


def coefficients(values: Mapping[str, Tensor], grads: Mapping[str, Tensor | None], size: int) -> Coefficients:
    """The six numbers from upstream gradients `grads` of the statistics `values`, for a vocabulary of `size` tokens.

    a = g_lse - g_H H + g_V (2H + H^2 - Var) - g_pay payload     b = -g_H + 2 g_V (1 + H)     c = g_V
    d = g_pay     s = g_mean / V     o = g_target
    """
    g = {name: grad for name, grad in grads.items() if grad is not None}
    a, o = (g[name] if name in g else torch.zeros_like(values["lse"]) for name in ("lse", "target"))
    b = None
    if "entropy" in g:
        a, b = a - g["entropy"] * values["entropy"], -g["entropy"]
    if "variance" in g:
        entropy = values["entropy"]
        a = a + g["variance"] * (2 * entropy + entropy**2 - values["variance"])
        b = 2 * g["variance"] * (1 + entropy) + (0 if b is None else b)
    if "payload" in g:
        a = a - g["payload"] * values["payload"]
    s = g["mean"] / size if "mean" in g else None
    return Coefficients(a=a, o=o, b=b, c=g.get("variance"), d=g.get("payload"), s=s)


def row_factor(coef: Coefficients, head: Head) -> Tensor:
    """The factor [N, 1] that backends leave out of dz for plain coefficients: a * scale, or the scale where a is 0."""
    return torch.where(coef.a == 0, 1.0, coef.a)[:, None] * head.scale


def __getattr__(name: str) -> Any:
    return renamed.attribute(__name__, name)
