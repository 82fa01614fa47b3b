"""The algebra of the waist: what a head is, what a token's softmax is reduced to, and how that is differentiated.

    z[t,j] = softcap(scale * (h_t . W_j + b_j))      p = softmax(z)      logp = z - lse

A token's row of logits is folded into a `State`, a monoid under `merge`; `finish` turns it into statistics; their
upstream gradients become six numbers a token (`coefficients`) from which every backend writes

    dz[t,j] = p_tj (a_t + b_t logp + c_t logp^2 + d_t pay_tj) + s_t + o_t 1[j = y_t]

Statistics, states and accumulators are float32 (float64 for float64 inputs); hidden states and weights keep their
dtype. Shapes: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .shard import Shard, enter, gather, total

DIFFERENTIABLE = ("lse", "target", "mean", "entropy", "variance", "payload")
FORWARD_ONLY = ("top", "rank", "log_sum_sq")
STATISTICS = DIFFERENTIABLE + FORWARD_ONLY


@dataclass(frozen=True, eq=False)
class Head:
    """An output head: `z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`; no tanh if `softcap` is None.

    Every post-head operation of transformers' causal LMs is of this form, so a head describes them all. With an
    `adapter`, hidden has R more features and the matrix is [weight | adapter]: two pieces, since one may be frozen.
    With a `shard`, weight, bias and adapter are a rank's part of a larger vocabulary; see `parallel`.
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None
    adapter: Tensor | None = None  # [V, R], for the last R features of hidden
    shard: Shard | None = None

    @property
    def size(self) -> int:
        """The number of tokens here, V."""
        return self.weight.shape[0]

    @property
    def vocabulary(self) -> int:
        """The number of tokens in the whole vocabulary, on all ranks."""
        return self.size if self.shard is None else self.shard.size

    @property
    def features(self) -> int:
        """The hidden size it takes, D + R."""
        return self.weight.shape[1] + (0 if self.adapter is None else self.adapter.shape[1])

    @property
    def matrices(self) -> dict[str, tuple[Tensor, slice]]:
        """Its matrices by the name in TENSORS, with the features of hidden each multiplies."""
        width = self.weight.shape[1]
        found = {"weight": (self.weight, slice(0, width))}
        if self.adapter is not None:
            found["adapter"] = (self.adapter, slice(width, None))
        return found

    def __getitem__(self, tokens: slice | Tensor) -> Head:
        """The same head over some tokens: a slice of those here, which copies nothing, or ids of the whole vocabulary,
        whose rows are put together from all ranks and are whole on each.
        """
        shard = self.shard
        if shard is None or isinstance(tokens, slice):
            return self._each(lambda x: x[tokens])
        places = tokens - shard.start
        here, places = (places >= 0) & (places < self.size), places.clamp(0, self.size - 1)

        def rows(x: Tensor) -> Tensor:
            mask = here.reshape(*here.shape, *[1] * (x.ndim - 1))
            return total(torch.where(mask, x[places], 0), shard)

        return replace(self._each(rows), shard=None)

    def detach(self) -> Head:
        """The same head without gradient."""
        return self._each(Tensor.detach)

    def to(self, dtype: torch.dtype) -> Head:
        """The same head in another dtype."""
        return self._each(lambda x: x.to(dtype))

    def tempered(self, temperature: float) -> Head:
        """The head of z / temperature."""
        softcap = None if self.softcap is None else self.softcap / temperature
        return replace(self, scale=self.scale / temperature, softcap=softcap)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Head:
        """The same head of changed tensors."""
        bias, adapter = (None if x is None else change(x) for x in (self.bias, self.adapter))
        return replace(self, weight=change(self.weight), bias=bias, adapter=adapter)

    def joined(self) -> Head:
        """The same head with one matrix, a copy if there is an adapter."""
        if self.adapter is None:
            return self
        return replace(self, weight=torch.cat([self.weight, self.adapter], 1), adapter=None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Dense logits [..., V] of hidden states [..., D] in the statistics' dtype, with autograd; of the whole
        vocabulary also with a shard.
        """
        hidden = enter(hidden, self.shard)
        raw = F.linear(hidden[..., : self.weight.shape[1]], self.weight, self.bias)
        if self.adapter is not None:
            raw = raw + F.linear(hidden[..., self.weight.shape[1] :], self.adapter)
        return self.activate(gather(raw.to(wide(hidden.dtype)), self.shard))

    def activate(self, raw: Tensor) -> Tensor:
        """Scale and softcap of the raw product; a new tensor unless there is nothing to do."""
        if self.softcap is None:
            return raw if self.scale == 1 else raw * self.scale
        return torch.tanh(raw * (self.scale / self.softcap)) * self.softcap

    def slope(self, z: Tensor) -> Tensor | float:
        """d z / d raw at the activated logit z."""
        return self.scale if self.softcap is None else self.scale * (1 - (z / self.softcap) ** 2)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and accumulators for inputs of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


class Stats:
    """What is left of every token's softmax: one float a token and statistic.

    `lse` log sum exp z; `target` z_y; `mean` mean of z over the vocabulary; `entropy` (nats); `variance` of logp
    under p (nats^2); `payload` expectation of the second head's logits under p; and, without gradient, `top` (the
    arg max), `rank` (how many logits exceed the label's) and `log_sum_sq` (log sum p^2). Ignored positions hold 0;
    `mask` is False there. Only what was asked for is there: any other name raises AttributeError and says how to ask.
    """

    lse: Tensor
    target: Tensor
    mean: Tensor
    entropy: Tensor
    variance: Tensor
    payload: Tensor
    top: Tensor
    rank: Tensor
    log_sum_sq: Tensor

    def __init__(self, values: Mapping[str, Tensor], labels: Tensor, mask: Tensor):
        self.values = dict(values)
        self.labels = labels
        self.mask = mask

    def __getattr__(self, name: str) -> Tensor:
        if name in self.__dict__.get("values", {}):
            return self.values[name]
        if name in STATISTICS:
            raise AttributeError(f"{name} was not computed: ask for it with outputs=({name!r}, ...)")
        raise AttributeError(f"Stats has no {name!r}; statistics are {', '.join(STATISTICS)}")

    @property
    def logp(self) -> Tensor:
        """Log-probability of the label, nats."""
        return self.target - self.lse

    @property
    def nll(self) -> Tensor:
        """Negative log-probability of the label, nats."""
        return self.lse - self.target

    @property
    def is_top1(self) -> Tensor:
        """Whether the label is the arg max; False at ignored positions."""
        return (self.top == self.labels) & self.mask

    def reshape(self, *shape: int) -> Stats:
        """The same statistics in another shape, for instance [B, T]."""
        values = {name: value.reshape(*shape) for name, value in self.values.items()}
        return Stats(values, self.labels.reshape(*shape), self.mask.reshape(*shape))

    def to(self, device: torch.device | str) -> Stats:
        """The same statistics on a device."""
        values = {name: value.to(device) for name, value in self.values.items()}
        return Stats(values, self.labels.to(device), self.mask.to(device))

    def detach(self) -> Stats:
        """The same statistics without their graph."""
        return Stats({name: value.detach() for name, value in self.values.items()}, self.labels, self.mask)

    def __repr__(self) -> str:
        return f"Stats({', '.join(self.values)}; shape={tuple(self.labels.shape)}, tokens={int(self.mask.sum())})"


@dataclass(frozen=True)
class State:
    """One row's running fold, [N] each, moments about the running maximum m (u = z - m); None where not asked for."""

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
    """The fold of two disjoint parts of the same rows: tiles, split grids, vocabulary-parallel ranks. Associative.

    An empty part is m = -inf with zero sums. Ties of the maximum go to the first part.
    """
    m = torch.maximum(x.m, y.m)
    x_moved, y_moved = _move(x, m), _move(y, m)
    summed: dict[str, Any] = {
        f.name: _add(getattr(x_moved, f.name), getattr(y_moved, f.name))
        for f in fields(State)
        if f.name not in ("m", "top")
    }
    top = None if x.top is None or y.top is None else torch.where(x.m >= y.m, x.top, y.top)
    return State(m=m, top=top, **summed)


def _add(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return None if x is None or y is None else x + y


def _move(x: State, m: Tensor) -> State:
    """Moments about a larger maximum: with delta = x.m - m, l' = e^d l, s1' = e^d (s1 + d l), ..."""
    delta = torch.where(x.m == m, 0.0, x.m - m).clamp(min=-1e4)  # an empty part moves by nothing that matters
    factor = torch.where(x.m == float("-inf"), 0.0, delta.exp())
    s1 = None if x.s1 is None else factor * (x.s1 + delta * x.l)
    s2 = None if x.s2 is None or x.s1 is None else factor * (x.s2 + 2 * delta * x.s1 + delta**2 * x.l)
    sp = None if x.sp is None else factor * x.sp
    sq = None if x.sq is None else factor**2 * x.sq
    return replace(x, m=m, l=factor * x.l, s1=s1, s2=s2, sp=sp, sq=sq)


def finish(state: State, target: Tensor, size: int) -> dict[str, Tensor]:
    """Statistics [N] of finished rows of a vocabulary of `size` tokens."""
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
    """The backward of any loss, six numbers a token; None is zero everywhere."""

    a: Tensor
    o: Tensor
    b: Tensor | None = None
    c: Tensor | None = None
    d: Tensor | None = None
    s: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether dz is p scaled by rows plus one entry a row: cross-entropy and every function of log p_y."""
        return self.b is None and self.c is None and self.d is None and self.s is None

    def __getitem__(self, rows: slice) -> Coefficients:
        kept: dict[str, Any] = {f.name: _rows(getattr(self, f.name), rows) for f in fields(self)}
        return Coefficients(**kept)


def _rows(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def coefficients(values: Mapping[str, Tensor], grads: Mapping[str, Tensor | None], size: int) -> Coefficients:
    """The six numbers from upstream gradients `grads` (by statistic) at `values`, for a vocabulary of `size` tokens.

    a = g_lse - g_H H + g_V (2H + H^2 - Var) - g_pay payload     b = -g_H + 2 g_V (1 + H)     c = g_V
    d = g_pay     s = g_mean / V     o = g_target
    """
    zero = torch.zeros_like(values["lse"])
    g = {name: grad for name, grad in grads.items() if grad is not None}
    a, o, b = g.get("lse", zero), g.get("target", zero), None
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
    """What plain coefficients leave out of dz, [N, 1]: a * scale, but the scale alone where a is 0."""
    return torch.where(coef.a == 0, 1.0, coef.a)[:, None] * head.scale


@dataclass(frozen=True)
class Survey:
    """What one visit of all logits leaves for the sparse tail."""

    values: dict[str, Tensor]  # statistics, [N] each
    coef: Coefficients  # plain, [N] each
    energy: Tensor  # [V] sum_t (a_t p_tj)^2, in units of the largest a^2
    mass: Tensor  # [groups, V] sum_t |a_t| p_tj, in units of the largest |a|


ALIGNMENT = 16  # rows or columns: what matmul kernels work in
TENSORS = ("hidden", "weight", "bias", "adapter", "payload_hidden", "payload_weight", "payload_bias")


@dataclass(frozen=True, eq=False)
class Problem:
    """What a backend is handed: valid tokens only, checked, compacted, on one device and in one dtype."""

    hidden: Tensor  # [N, D]
    head: Head
    labels: Tensor  # [N], of the whole vocabulary
    outputs: frozenset[str]  # statistics to compute, closed under what their gradients need
    payload: tuple[Tensor, Head] | None = None  # ([N, D2], head of the same V)
    memory_budget: int = 24 << 20  # bytes of logits alive at a time
    tail: float = 0.0  # relative error allowed to the logits' gradient by compressing its tail; 0 is exact
    needs: frozenset[str] = frozenset()  # which of TENSORS want a gradient

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Every tensor a gradient can flow to, in the order of TENSORS."""
        own = (self.hidden, self.head.weight, self.head.bias, self.head.adapter)
        if self.payload is None:
            return (*own, None, None, None)
        return (*own, self.payload[0], self.payload[1].weight, self.payload[1].bias)

    def with_tensors(self, tensors: tuple[Any, ...], labels: Any) -> Problem:
        """The same problem over other tensors, in the order of TENSORS; over None, to keep what is no tensor."""
        hidden, weight, bias, adapter, payload_hidden, payload_weight, payload_bias = tensors
        head = replace(self.head, weight=weight, bias=bias, adapter=adapter)
        payload = self.payload
        if payload is not None:
            payload = (payload_hidden, replace(payload[1], weight=payload_weight, bias=payload_bias))
        return replace(self, hidden=hidden, head=head, labels=labels, payload=payload)

    @property
    def places(self) -> Tensor:
        """Labels as columns of the head [N]; outside [0, V) where another rank has them."""
        return self.labels if self.head.shard is None else self.labels - self.head.shard.start

    def rows(self) -> list[slice]:
        """Row chunks whose logits (and payload) over the whole head fit the memory budget; the same on all ranks."""
        shard = self.head.shard
        return pieces(len(self.labels), self._fitting(self.head.size if shard is None else shard.width))

    def columns(self) -> list[slice]:
        """Column panels whose logits (and payload) for all tokens fit the memory budget."""
        return pieces(self.head.size, self._fitting(len(self.labels)))

    def _fitting(self, length: int) -> int:
        """How many rows or columns of `length` logits fit the memory budget."""
        bytes_each = length * self.hidden.element_size() * (1 if self.payload is None else 2)
        return max(1, self.memory_budget // max(1, bytes_each))


def pieces(count: int, most: int) -> list[slice]:
    """0..count in as few slices of at most `most` as can be: about equal (a short one would run slowly), and multiples
    of ALIGNMENT where that fits.
    """
    step = -(-count // max(1, -(-count // most))) or 1
    aligned = -(-step // ALIGNMENT) * ALIGNMENT
    step = aligned if aligned <= most else step
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
