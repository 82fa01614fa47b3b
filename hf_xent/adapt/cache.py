"""TFUP: zero-shot classes helped by a cache of typical rows without labels; nothing is trained.

    cache = TFUP(class_texts(model, tokenizer, names)).fit(f)   # f [N, D]: features of all rows, none has a label
    logits = cache.logits(f)                                    # [N, C]

    1. p = softmax(10 f W^T).  For each class i, of the 2K rows with the largest p_i keep the K with the smallest
       s_j = sum_m sum_c p_jc log(p_jc / p_mc), those that the others are near to: the keys F [CK, D] with the values i
    2. sim_k = 2 (1 - minmax_k KL(p || p_k))                    for each row: 2 for its nearest key, 0 the farthest
    3. z = 100 f W^T + alpha sum_k exp(-beta (1 - sim_k f F_k^T)) 1_k

Features f and classes W are of unit length. K is 0.3 N / C, within 9 and 16.

Source: Long et al. 2024, Training-Free Unsupervised Prompt for Vision-Language Models, arXiv:2404.16339, and its code,
whose z-score before the min-max is left out, for it changes nothing, and whose half precision makes KL of certain rows
NaN; here it is float32 or wider.
Relations: with alpha = 0 it is `ZeroShot`. `TFUPT` trains adapters on the labels that this cache gives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.statistics import widened
from ..options.ranges import check_count, check_fields

WIDTH = 1024
"""Rows whose divergences from all keys are in memory at a time."""


@dataclass
class TFUP:
    """Zero-shot classes with a cache of unlabelled rows; see the module's docstring.

    Args:
        classes: Features of the names of classes [C, D], such as those of `class_texts`, of any length.
        alpha: The weight of the cache; with 0 it is zero-shot classification.
        beta: How fast the weight of a key falls with its distance.
        scale: What cosines are multiplied by in logits.
        sharpness: What they are multiplied by in p.
        count: The number K of keys of each class; by the number of rows if it is left out.

    Raises:
        ValueError: Classes that are not one finite row each, or an option out of its range.
    """

    classes: Tensor
    alpha: float = 0.3
    beta: float = 1.0
    scale: float = 100.0
    sharpness: float = 10.0
    count: int | None = None
    keys: Tensor | None = field(default=None, init=False)
    """The features of the kept rows [M, D], once there are some."""
    labels: Tensor | None = field(default=None, init=False)
    """The class that each key is kept for [M]."""
    rows: Tensor | None = field(default=None, init=False)
    """Which rows were kept [M]."""
    ranges: ClassVar[dict[str, str]] = {
        "alpha": "[0, inf)",
        "beta": "[0, inf)",
        "scale": "(0, inf)",
        "sharpness": "(0, inf)",
    }

    def __post_init__(self) -> None:
        check_fields(self, self.ranges)
        if self.count is not None:
            check_count("count", self.count, 1)
        if self.classes.ndim != 2 or len(self.classes) < 2:
            raise ValueError(f"classes have the shape {tuple(self.classes.shape)}: give a row for each of two or more")
        self.classes = unit(self.classes, self.classes.shape[1], "classes")

    def fit(self, features: Tensor) -> TFUP:
        """Keep the typical rows of each class; what was kept before is forgotten.

        Args:
            features: [N, D], of rows without labels, best of all that `logits` will be asked for.

        Returns:
            The object itself.

        Raises:
            ValueError: Fewer rows than classes, rows of another width, or one that is not finite.
        """
        f = unit(features, self.classes.shape[1])
        n, c = len(f), len(self.classes)
        if n < c:
            raise ValueError(f"features have {n} rows, fewer than the {c} classes: give more unlabelled rows")
        self.classes = self.classes.to(f)
        count = min(max(int(0.3 * n / c), 9), 16) if self.count is None else self.count
        chosen = self.typical(f, count)
        self.rows, self.keys = chosen.flatten(), f[chosen.flatten()]
        self.labels = torch.arange(c, device=f.device).repeat_interleave(chosen.shape[1])
        return self

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """The logits [N, C] of rows [N, D], float32 or wider.

        Raises:
            ValueError: Before `fit`, or bad features as in `fit`.
        """
        f = unit(features, self.classes.shape[1])
        return self.scored(f, self.classes.to(f))

    def predict(self, features: Tensor) -> Tensor:
        """The classes [N] of rows [N, D]."""
        return self.logits(features).argmax(-1)

    def typical(self, f: Tensor, count: int) -> Tensor:
        """Step 1: of unit rows [N, D], the indices [C, K] of those that are kept for each class, K at most N."""
        logp = self._logp(f, self.classes).double()  # differences of sums over up to 2K rows
        nearest = logp.argsort(dim=0, descending=True, stable=True)[: 2 * count].T  # [C, 2K]
        kept = []
        for rows in nearest:
            own = logp[rows]
            p = own.exp()
            total = len(own) * (p * own).sum(1) - p @ own.sum(0)
            kept.append(rows[total.argsort(stable=True)[:count]])
        return torch.stack(kept)

    def scored(self, f: Tensor, classes: Tensor) -> Tensor:
        """Steps 2 and 3: the logits [N, C] of unit rows f [N, D] under unit classes [C, D]. Raises: ValueError."""
        if self.keys is None or self.labels is None:
            raise ValueError("the cache is empty: call fit(features) first")
        keys, labels = self.keys.to(f), self.labels.to(f.device)
        values, theirs = F.one_hot(labels, len(classes)).to(f), self._logp(keys, classes)
        parts = []
        for rows in f.split(WIDTH):
            logp = self._logp(rows, classes)
            p = logp.exp()
            kl = (p * logp).sum(1, keepdim=True) - p @ theirs.T  # [n, M]
            least, most = kl.aminmax(dim=1, keepdim=True)
            similar = 2 * (1 - (kl - least) / (most - least).clamp(min=torch.finfo(kl.dtype).tiny))
            affinity = (-self.beta * (1 - similar * (rows @ keys.T))).exp()
            parts.append(self.scale * rows @ classes.T + self.alpha * affinity @ values)
        return torch.cat(parts)

    def _logp(self, f: Tensor, classes: Tensor) -> Tensor:
        return (self.sharpness * f @ classes.T).log_softmax(-1)


def unit(features: Tensor, width: int, name: str = "features", axes: int = 2) -> Tensor:
    """Rows [N, D], or with three axes views of rows [V, N, D], of unit length, float32 or wider, without gradient.

    Raises:
        ValueError: Another shape, or values that are not finite.
    """
    if features.ndim != axes or features.shape[-1] != width:
        raise ValueError(f"{name} have the shape {tuple(features.shape)}, but the classes have {width} numbers each")
    if not features.isfinite().all():
        bad = int((~features.isfinite().all(-1)).sum())
        raise ValueError(f"{name} have {bad} rows with nan or inf: leave them out, or run the model in float32")
    return F.normalize(widened(features.detach()), dim=-1)
