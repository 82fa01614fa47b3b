"""RePRI: two classes of pixels (or words) from a few marked examples, and from the unmarked ones that are asked for.

    z(f) = 20 cos(f, w) - b       p = sigmoid(z)          the probability of the foreground
    w <- mean feature of the support's foreground         b <- mean of 20 cos(f, w) over the query
    pi <- (1 - mean p, mean p) over the query             49 steps of gradient descent on w and b, of rate 0.025, of
    CE(support) + k KL(mean of (1 - p, p) over the query || pi) + h mean entropy of p over the query

k and h are 1 / shots. After 9 steps pi is taken again, and k grows by 1. The features stay as they are, and every task
has a w and a b of its own, so that tasks of a batch do not see one another.

    p = RePRI().fit_predict(support_features, support_labels, query_features)       # [B, M]
    p = RePRI().segment(model, support_images, support_masks, query_images)         # [B, H, W]

The gradient is written out (`episode.py`), so nothing is recorded, and inference mode does not matter.

Source: Boudiaf et al. 2021, Few-Shot Segmentation Without Meta-Learning: A Good Transductive Inference Is All You Need?
(CVPR), and the authors' code, which takes the padding of the query from its ground truth; here it is a mask of the
user's, and b is the mean over what is no padding. They also divide features by their length first, as is done here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..options.ranges import check_count, check_fields, check_number
from .episode import Episode, checked_prior, start
from .maps import feature_maps, on_grid


@dataclass(frozen=True)
class RePRI:
    """The options; the module's docstring has formula and examples."""

    steps: int = 49
    """Steps of gradient descent; with 0, the classifier is the initial one: a prototype and a threshold."""
    learning_rate: float = 0.025
    """What the gradient is multiplied by in each of these steps."""
    kl: float | None = None
    """The weight of the KL divergence: 1 / shots if it is left out, and 0 for none."""
    entropy: float | None = None
    """The weight of the entropy: 1 / shots if it is left out, and 0 for none."""
    refresh: int = 9
    """After how many steps pi is taken again and the KL's weight grows by 1, unless the user gives pi; 0 for never."""
    temperature: float = 20.0
    """What cosines are multiplied by."""
    normalize: bool = True
    """Whether features are divided by their length before their mean is taken for w."""
    ranges: ClassVar[dict[str, str]] = {"learning_rate": "(0, inf)", "temperature": "(0, inf)"}

    def __post_init__(self) -> None:
        check_fields(self, self.ranges)
        check_count("steps", self.steps, 0)
        check_count("refresh", self.refresh, 0)
        for name in ("kl", "entropy"):
            if getattr(self, name) is not None:
                check_number(self, name, "[0, inf)")

    @torch.no_grad()
    def fit(
        self,
        support_features: Tensor,
        support_labels: Tensor,
        query_features: Tensor,
        mask: Tensor | None = None,
        *,
        prior: float | Tensor | None = None,
        shots: int = 1,
    ) -> Episode:
        """The classifiers of a batch of tasks; arguments and errors are those of `fit_predict`, but all have a B."""
        check_count("shots", shots, 1)
        tasks = start(
            support_features,
            support_labels,
            query_features,
            mask,
            temperature=self.temperature,
            normalize=self.normalize,
        )
        if prior is not None:
            tasks.prior = checked_prior(prior, tasks.b)
        kl, entropy = (1 / shots if weight is None else weight for weight in (self.kl, self.entropy))
        for step in range(1, self.steps + 1):
            by_w, by_b = tasks.gradient(kl, entropy)
            tasks.w, tasks.b = tasks.w - self.learning_rate * by_w, tasks.b - self.learning_rate * by_b
            if step == self.refresh and prior is None and kl:
                tasks.prior, kl = tasks.shares()[1], kl + 1
        return tasks

    def fit_predict(
        self,
        support_features: Tensor,
        support_labels: Tensor,
        query_features: Tensor,
        mask: Tensor | None = None,
        *,
        prior: float | Tensor | None = None,
        shots: int = 1,
    ) -> Tensor:
        """The probability that a row of the query is foreground.

        Args:
            support_features: [B, N, D], of any float dtype; arithmetic is in float32 or wider.
            support_labels: [B, N]: 1 for the foreground, 0, or -100 for padding and unknown rows.
            query_features: [B, M, D]; one task alone may leave out B everywhere.
            mask: [B, M], True for what is no padding; all rows if it is left out. Padding has no influence.
            prior: pi, the share of the foreground in the query, if it is known: a number, or one a task [B].
            shots: The images (or sentences) of a support, for weights that are 1 / shots.

        Returns:
            [B, M], from 0 to 1; nan where it is padding.

        Raises:
            ValueError: A task without foreground in its support or without rows in its query, shapes that do not fit,
                labels other than 0, 1 and -100, features that are not finite, or a prior outside of [0, 1].
        """
        parts, one = (support_features, support_labels, query_features), query_features.ndim == 2
        support, labels, query = (part[None] if one else part for part in parts)
        rows = mask[None] if one and mask is not None else mask
        found = self.fit(support, labels, query, rows, prior=prior, shots=shots).probabilities()
        return found[0] if one else found

    @torch.no_grad()
    def segment(
        self,
        model: Any | Callable[[Tensor], Tensor],
        support_images: Tensor,
        support_masks: Tensor,
        query_images: Tensor,
        mask: Tensor | None = None,
        *,
        prior: float | Tensor | None = None,
    ) -> Tensor:
        """The probability that a pixel is foreground, of one query image for each task.

        Masks are taken at the centres of the cells of the feature map; logits are drawn between them linearly.

        Args:
            model: What `feature_maps` reads, or a function from pixels [N, C, H, W] to maps [N, D, h, w].
            support_images: [B, S, C, H, W], with S shots.
            support_masks: [B, S, H, W]: 1 for the foreground, 0, or -100.
            query_images: [B, C, H, W].
            mask: [B, H, W], True for what is no padding of the query; never from its ground truth.
            prior: As in `fit_predict`.

        Returns:
            [B, H, W], from 0 to 1; nan where it is padding, or all cells around are.

        Raises:
            ValueError: As in `fit_predict`; or no foreground is left in the cells of the feature map.
        """
        if support_images.ndim != 5 or support_masks.shape != (*support_images.shape[:2], *support_images.shape[3:]):
            raise ValueError(
                f"support_images has the shape {tuple(support_images.shape)} and support_masks"
                f" {tuple(support_masks.shape)}: give [B, S, C, H, W] and [B, S, H, W]"
            )
        count, shots = support_images.shape[:2]
        support = feature_maps(model, support_images.flatten(0, 1))
        query = feature_maps(model, query_images)
        labels = on_grid(support_masks, support.shape[-2:]).reshape(count, -1)
        if len(bare := ((labels == 1).sum(1) == 0).nonzero().flatten()):
            raise ValueError(
                f"support_masks of task {int(bare[0])} have no foreground in the cells of the feature map,"
                f" {tuple(support.shape[-2:])}: mark larger parts, or take maps of an earlier layer"
            )
        cells = None if mask is None else on_grid(mask, query.shape[-2:]).flatten(1)
        rows = support.unflatten(0, (count, shots)).movedim(2, -1).flatten(1, 3)
        tasks = self.fit(rows, labels, query.flatten(2).transpose(1, 2), cells, prior=prior, shots=shots)
        valid = tasks.query_weight > 0  # cells that are padding have no part in what is drawn between the others
        z = tasks.logits(tasks.query) * valid
        maps = torch.stack([z, valid.to(z.dtype)], 1).unflatten(2, query.shape[-2:])
        z, near = F.interpolate(maps, query_images.shape[-2:], mode="bilinear").unbind(1)
        found = (z / near).sigmoid()
        return found if mask is None else found.masked_fill(~mask.bool(), torch.nan)
