"""Core-tuning: cross-entropy and a focal contrastive loss, both on the rows and on two mixtures of features for each.

    CE(z, t) + eta mean_i [sum_j w_ij (pi_ij - 1) log pi_ij / sum_j w_ij],  w_ij = t_i . t_j,  over 3N rows (f, f-, f+)

    f-  l f' + (1 - l) f        f' another row of the batch by chance, l ~ Beta(1, 1), but at least 0.8
    f+  l f_p + (1 - l) f_n     f_p the least similar row of the same class, f_n the most similar one of another class
    t   the labels, mixed by the same l;  z the given logits of f, and the head's of the mixtures
    pi  the softmax of v_i . v_j / tau over j != i, with v the features, projected D -> D -> 256 to unit length

Similar is meant by cosine. A row that is alone in its class is its own f_p, one without another class its own f_n.
l and f' are drawn anew in each call, on the CPU and from torch's global generator, so that a seed repeats them.

It differs from the authors' code. There the features in the list are detached, so that the classification of plain rows
does not train the encoder; two mixtures attract only if a number made of their labels is the same to the bit, which in
float32 happens to different labels; a row that is alone in its class gets the first row of the batch as f_p; and the
contrastive loss is the mean over all 3N columns. Here f is trained, and the mean is that over the labels that two rows
share, which is about K times as much with K balanced classes: the authors' weight 10 for the ten classes of CIFAR-10 is
about the 1 that is the default here.

Source: Zhang et al. 2021, Unleashing the Power of Contrastive Self-Supervised Visual Models via Contrast-Regularized
Fine-Tuning, NeurIPS; code at github.com/Vanint/Core-tuning.
Relations: `supcon` is the contrastive loss of the rows alone; mixing features and labels alone is manifold mixup.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .supcon import SupCon, contrasted, projected, supervised_contrastive, through


@dataclass(frozen=True)
class CoreTuning(SupCon):
    """Soft cross-entropy and focal contrastive loss of rows and mixtures; see the module's docstring."""

    concentration: float = 1.0
    """Both parameters of the Beta distribution of l; 1 is the uniform one."""
    least: float = 0.8
    """The least share l of the other row in f-."""
    needs: ClassVar[tuple[str, ...]] = ("features", "head", "state")
    ranges: ClassVar[dict[str, str]] = {**SupCon.ranges, "concentration": "(0, inf)", "least": "[0, 1]"}

    def draw(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """The places [N] of f', and the shares [N, 1] of f- and of f+."""
        shares = torch.distributions.Beta(self.concentration, self.concentration)
        return torch.randperm(rows), shares.sample((rows, 1)).clamp(min=self.least), shares.sample((rows, 1))

    def __call__(self, logits: Tensor, labels: Tensor, **given: Any) -> Tensor:
        """The loss, a scalar, of logits [N, K], labels [N], features [N, D], the head and the projection as `state`.

        Raises:
            KeyError: Features, head or state are missing.
        """
        features, targets = given["features"].to(logits.dtype), F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        if not len(labels):
            return (logits.sum() + features.sum()) * 0
        other, *shares = (x.to(logits.device) for x in self.draw(len(labels)))
        positive, negative = hardest(features.detach(), labels)
        negative_share, positive_share = (share.to(logits.dtype) for share in shares)

        def mixtures(x: Tensor) -> Tensor:
            return torch.cat([x.lerp(x[other], negative_share), x[negative].lerp(x[positive], positive_share)])

        mixed, targets = mixtures(features), torch.cat([targets, mixtures(targets)])
        scores = torch.cat([logits, through(given["head"], mixed, logits.dtype)])
        vectors = through(given["state"], torch.cat([features, mixed]), logits.dtype)
        contrastive = supervised_contrastive(F.normalize(vectors, dim=-1), targets, self.temperature, focal=True)
        return F.cross_entropy(scores, targets) + self.eta * contrastive

    def reference(self, logits: Any, labels: Any, **given: Any) -> np.ndarray:
        """The same list, made row by row, with the same draws in the same order."""
        f, y = np.asarray(given["features"], np.float64), np.asarray(labels)
        one_hot = np.eye(np.shape(logits)[1])[y]
        other, away, near = (x.double().numpy() for x in self.draw(len(y)))
        unit = f / np.sqrt((f**2).sum(1, keepdims=True))
        rows, targets = [], []
        for i in range(len(y)):
            rows.append(away[i] * f[int(other[i])] + (1 - away[i]) * f[i])
            targets.append(away[i] * one_hot[int(other[i])] + (1 - away[i]) * one_hot[i])
        for i in range(len(y)):
            same = [j for j in range(len(y)) if y[j] == y[i] and j != i] or [i]
            rest = [j for j in range(len(y)) if y[j] != y[i]] or [i]
            p, n = min(same, key=lambda j: unit[i] @ unit[j]), max(rest, key=lambda j: unit[i] @ unit[j])
            rows.append(near[i] * f[p] + (1 - near[i]) * f[n])
            targets.append(near[i] * one_hot[p] + (1 - near[i]) * one_hot[n])
        weight, bias = (x.detach().double().numpy() for x in (given["head"].weight, given["head"].bias))
        z = np.concatenate([np.asarray(logits, np.float64), np.stack(rows) @ weight.T + bias])
        t, every = np.concatenate([one_hot, targets]), np.concatenate([f, rows])
        cross_entropy = -(t * (z - np.log(np.exp(z).sum(1, keepdims=True)))).sum(1).mean()
        vectors = projected(given["state"], every)
        return np.asarray(cross_entropy + self.eta * contrasted(vectors, t, self.temperature, focal=True))


def hardest(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the place [N] of the least similar one of its class, and that of the most similar of another class.

    A row for which there is none is its own.
    """
    unit = F.normalize(features, dim=-1)
    similarities, same = unit @ unit.T, labels[:, None] == labels
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positives = similarities.masked_fill(~same, torch.inf).masked_fill(itself, 2)  # 2: more than any cosine
    negatives = similarities.masked_fill(same, -torch.inf).masked_fill(itself, -2)
    return positives.argmin(-1), negatives.argmax(-1)
