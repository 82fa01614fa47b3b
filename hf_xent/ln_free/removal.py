"""Removal of norms from a wrapped model by site: the sites, their removed shares, and the sigmas that replace divisors.

`wrap` names the sites; a norm that attention reads has two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.contexts import eval_mode
from ..options.ranges import is_number
from .norms import FakeNorm, fake_norms

KINDS = ("mlp", "qk", "v", "final")
"""The kinds of sites, in the paper's order of removal."""
FINAL = (KINDS[3],)
"""The sites of the norm before the head."""


@dataclass(frozen=True)
class Site:
    """One removable normalization and its current state; `name` is 'mlp.3', 'qk.3', 'v.3' or 'final', for instance."""

    name: str
    kind: str
    layer: int | None
    norm: str  # the module's name in the model
    share: float  # the removed share, 0 to 1
    sigma: float  # nan before the first batch

    @property
    def removed(self) -> bool:
        """Whether nothing normalizes here any more."""
        return self.share == 1


def sites(model: nn.Module) -> list[Site]:
    """The sites of a model in the paper's order: MLPs, queries and keys, values, each by layer, then the final norm.

    Args:
        model: A model that `wrap` has made removable.

    Returns:
        A `Site` for each, with its current state.

    Raises:
        ValueError: The model was not wrapped.
    """
    rows = []
    for name, norm in fake_norms(model).items():
        for site, share in zip(norm.sites, norm.shares, strict=True):
            kind, _, layer = site.partition(".")
            rows.append(Site(site, kind, int(layer) if layer else None, name, share, float(norm.sigma)))
    return sorted(rows, key=lambda site: (KINDS.index(site.kind), site.layer or 0))


def remove(model: nn.Module, site: str, share: float = 1.0) -> None:
    """Freezes a site's divisor at its sigma, or removes a share of the norm; repeating it has no effect.

    Args:
        model: A wrapped model.
        site: A name as `sites` has them: 'mlp.3', 'qk.3', 'v.3', 'final'.
        share: The exponent a of the divisor sigma_x^(1 - a) sigma^a, in [0, 1]; 1 removes the norm.

    Raises:
        ValueError: An unknown site, a share out of range, or a norm that has seen no batch yet.
    """
    if not is_number(share, "[0, 1]"):
        raise ValueError(f"share is {share!r}: choose one from 0 (the norm stays) to 1 (it is removed)")
    _norm_of(model, site).switch(site, float(share))


def restore(model: nn.Module, site: str) -> None:
    """Makes a site normalize again.

    Args:
        model: A wrapped model.
        site: A name as `sites` has them.

    Raises:
        ValueError: An unknown site.
    """
    _norm_of(model, site).switch(site, 0.0)


def _norm_of(model: nn.Module, site: str) -> FakeNorm:
    norms = {name: norm for norm in fake_norms(model).values() for name in norm.sites}
    if site not in norms:
        raise ValueError(f"site is {site!r}: choose one of {type(model).__name__}'s, {', '.join(sorted(norms))}")
    return norms[site]


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[dict[str, Any]]) -> None:
    """Sets the sigma of every norm that is not removed to the mean over batches, without training.

    Args:
        model: A wrapped model; its mode is not changed.
        batches: Model inputs, such as `[{"input_ids": ids}]`; batches of padding alone do not count.

    Raises:
        ValueError: No batch has a token, or the model was not wrapped.
    """
    norms, count = list(fake_norms(model).values()), 0
    momenta, watch = [norm.momentum for norm in norms], norms[0].watch
    watch.always = True
    try:
        with eval_mode(model):
            for batch in batches:
                mask = batch.get("attention_mask")
                if mask is not None and not mask.any():
                    continue
                for norm in norms:
                    norm.momentum = count / (count + 1)
                    if not count and not norm.removed:
                        norm.sigma.fill_(float("nan"))
                model(**batch)
                count += 1
    finally:
        watch.always = False
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if not count:
        raise ValueError("batches has no batch with a token: pass model inputs, such as [{'input_ids': ids}]")
