"""A batch of tasks with two classes, and the cosine classifier of each: what `RePRI` descends on.

episode = start(support_features, support_labels, query_features, mask, temperature=20.0, normalize=True)
by_w, by_b = episode.gradient(kl=1.0, entropy=1.0)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.statistics import widened

IGNORED = -100
WITHIN = 1e-10  # the authors', added to pi within the logarithm: an oracle may know that there is no foreground


@dataclass
class Episode:
    """A batch of B tasks and their classifiers; weights of rows are 0 for padding, and sum to 1 in each task."""

    support: Tensor
    """Features of unit length [B, N, D], with `target` [B, N], 0 or 1, and `support_weight` [B, N]."""
    target: Tensor
    support_weight: Tensor
    query: Tensor
    """Features of unit length [B, M, D], with `query_weight` [B, M]."""
    query_weight: Tensor
    temperature: float
    w: Tensor
    """[B, D]"""
    b: Tensor
    """[B]"""
    prior: Tensor
    """The share pi of the foreground [B]."""

    def logits(self, features: Tensor) -> Tensor:
        """z of features of unit length: [B, N, D] -> [B, N]."""
        return self.temperature * _cosine(features, self.w) - self.b[:, None]

    def probabilities(self) -> Tensor:
        """p of the query [B, M]; nan where it is padding."""
        return self.logits(self.query).sigmoid().masked_fill(self.query_weight == 0, torch.nan)

    def shares(self) -> tuple[Tensor, Tensor]:
        """The mean of 1 - p and of p over the query, both [B], each summed by itself: neither is rounded to 0."""
        z = self.logits(self.query)
        back, front = ((self.query_weight * sign.sigmoid()).sum(1) for sign in (-z, z))
        return back.clamp(min=torch.finfo(z.dtype).tiny), front.clamp(min=torch.finfo(z.dtype).tiny)

    def terms(self) -> dict[str, Tensor]:
        """Cross-entropy of the support, KL divergence and entropy of the query: `ce`, `kl` and `entropy`, all [B]."""
        z, t = self.logits(self.query), self.logits(self.support)
        entropy = -(z.sigmoid() * F.logsigmoid(z) + (-z).sigmoid() * F.logsigmoid(-z))
        ce = F.binary_cross_entropy_with_logits(t, self.target, reduction="none")
        shares, priors = self.shares(), (1 - self.prior, self.prior)
        kl = sum(share * (share / (prior + WITHIN)).log() for share, prior in zip(shares, priors, strict=True))
        return {
            "ce": (self.support_weight * ce).sum(1),
            "kl": torch.as_tensor(kl),
            "entropy": (self.query_weight * entropy).sum(1),
        }

    def gradient(self, kl: float, entropy: float) -> tuple[Tensor, Tensor]:
        """The gradient of ce + kl KL + entropy H by w [B, D] and by b [B].

            d CE / dz = p - y       d H / dz = -z p (1 - p)       d KL / dz = p (1 - p) log(mean p / pi * ...)

        each times the weight of its row, and dz / dw = 20 (f - cos w / |w|) / |w|.
        """
        t, z = self.logits(self.support), self.logits(self.query)
        by_support = self.support_weight * (t.sigmoid() - self.target)
        back, front = self.shares()
        odds = (front / (self.prior + WITHIN)).log() - (back / (1 - self.prior + WITHIN)).log()
        slope = z.sigmoid() * (-z).sigmoid()
        by_query = self.query_weight * slope * (kl * odds[:, None] - entropy * z)
        by_b = -(by_support.sum(1) + by_query.sum(1))
        along = _weighted(self.support, by_support) + _weighted(self.query, by_query)
        length = self.w.norm(dim=-1, keepdim=True).clamp(min=WITHIN)
        unit = self.w / length
        across = along - (along * unit).sum(-1, keepdim=True) * unit  # w's own direction changes no cosine
        return self.temperature * across / length, by_b


def start(
    support: Tensor, labels: Tensor, query: Tensor, mask: Tensor | None, *, temperature: float, normalize: bool
) -> Episode:
    """The tasks under their initial classifiers; arguments and errors are those of `RePRI.fit_predict`."""
    _check_shapes(support, labels, query, mask)
    valid = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device) if mask is None else mask.bool()
    _check_rows(labels, valid)
    known = labels != IGNORED
    support, query = _prepared(support, known, "support"), _prepared(query, valid, "query")
    units, query = (F.normalize(part, dim=-1, eps=WITHIN) for part in (support, query))
    w = _weighted(units if normalize else support, _shares_of(labels == 1, support.dtype))
    weight = _shares_of(valid, query.dtype)
    b = temperature * (weight * _cosine(query, w)).sum(1)
    target, shares = (labels == 1).to(support.dtype), _shares_of(known, support.dtype)
    episode = Episode(units, target, shares, query, weight, temperature, w, b, torch.empty_like(b))
    episode.prior = episode.shares()[1]
    return episode


def checked_prior(prior: float | Tensor, like: Tensor) -> Tensor:
    """The user's pi, as one for each task [B]. Raises: ValueError."""
    found = torch.as_tensor(prior, dtype=like.dtype, device=like.device)
    if found.ndim > 1 or (found.ndim and len(found) != len(like)) or not ((found >= 0) & (found <= 1)).all():
        raise ValueError(f"prior is {prior!r}: give a share in [0, 1], or one for each of {len(like)} tasks")
    return found.expand_as(like)


def _cosine(units: Tensor, w: Tensor) -> Tensor:
    """The cosine of w [B, D] and of features of unit length [B, N, D]."""
    return _product(units, F.normalize(w, dim=-1, eps=WITHIN).unsqueeze(-1)).squeeze(-1)


def _weighted(features: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum [B, D] of features [B, N, D]."""
    return _product(weights.unsqueeze(1), features).squeeze(1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Their product in their own dtype: cosines of bfloat16 times 20 would be off by a tenth."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def _shares_of(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of rows [B, N] that sum to 1 in each task, 0 where they are False."""
    return rows.to(dtype) / rows.sum(1, keepdim=True)


def _prepared(features: Tensor, rows: Tensor, name: str) -> Tensor:
    """Features in float32 or wider, and 0 where they are padding, which may hold anything."""
    found = widened(features).detach()
    found = found.masked_fill(~rows.unsqueeze(-1), 0.0)
    if not found.isfinite().all():
        raise ValueError(f"{name}_features are not finite in some row: mask it, or leave it out")
    return found


def _check_shapes(support: Tensor, labels: Tensor, query: Tensor, mask: Tensor | None) -> None:
    shapes = [tuple(part.shape) for part in (support, labels, query)]
    fitting = support.ndim == query.ndim == 3 and labels.shape == support.shape[:2]
    if not fitting or len(support) != len(query) or support.shape[2] != query.shape[2]:
        raise ValueError(
            f"support_features, support_labels and query_features have the shapes {shapes}: give [B, N, D], [B, N] and"
            " [B, M, D]"
        )
    if not (support.is_floating_point() and query.is_floating_point()):
        raise ValueError(f"features are {support.dtype} and {query.dtype}: pass floating point numbers")
    if mask is not None and mask.shape != query.shape[:2]:
        raise ValueError(f"mask has the shape {tuple(mask.shape)}: give {tuple(query.shape[:2])}, a row each")


def _check_rows(labels: Tensor, valid: Tensor) -> None:
    if len(strange := labels[(labels != 0) & (labels != 1) & (labels != IGNORED)]):
        raise ValueError(f"support_labels hold {strange[0].item()}: write 0, 1, or {IGNORED} for what is ignored")
    for name, rows, remedy in (
        ("support_labels", labels == 1, "row of the foreground (1): mark one"),
        ("mask", valid, "row that is no padding: leave the task out"),
    ):
        if len(bare := (~rows.any(1)).nonzero().flatten()):
            raise ValueError(f"{name} of task {int(bare[0])} have no {remedy}")
