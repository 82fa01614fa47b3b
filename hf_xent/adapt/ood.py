"""Whether an input belongs to one of the classes at all: its share of the classes beside words that name none of them.

    S = mean_g sum_{c in ID} softmax([z_ID, z_g])_c,   z = cos / temperature        g: groups of the negative labels
    S = max_c softmax(z_ID)_c                                                       without negative labels

A row is likely to belong to a class if S is large, whichever negatives it is compared with; its class is the largest of
z_ID. The first is that of negative labels; the second is MCM, the maximum of concepts' matching. Fewer negatives in a
denominator leave more to the classes, so groups never lower S, and one group is no grouping.

Source: Zhang et al., LAPT: Label-driven automated prompt tuning for OOD detection with vision-language models, with 100
groups drawn at random; its temperature .01 is that of CLIP. MCM is Ming et al. 2022, with temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..options.ranges import check_count, is_number


class Scored(NamedTuple):
    """Rows and how well they fit the classes."""

    score: Tensor
    """[N], float64, in [0, 1]; large for rows that belong to a class."""
    predicted: Tensor
    """The class of each row [N], if it belongs to one."""


def ood_score(
    features: Tensor,  # [N, D]
    id_features: Tensor,  # [C, D]
    negative_features: Tensor | None = None,  # [M, D]
    *,
    groups: int = 100,
    temperature: float = 0.01,
    seed: int = 0,
) -> Scored:
    """How well rows fit the classes; see the module's docstring for the formula.

    Args:
        features: The features of the rows, such as those of `hf_xent.adapt.features`; they are brought to unit length.
        id_features: Those of the names of the classes.
        negative_features: Those of the negative labels; without them, the largest probability of a class is returned.
        groups: Into how many groups of about the same size the negative labels are split; 1 is no grouping.
        temperature: What cosines are divided by.
        seed: Seed of the split.

    Returns:
        The scores and the predicted classes.

    Raises:
        ValueError: A temperature that is not positive, features of unequal widths or that are not finite, or more
            groups than negatives.
    """
    if not is_number(temperature, "(0, inf)"):
        raise ValueError(f"temperature is {temperature!r}: choose a number in (0, inf)")
    tables = [id_features] if negative_features is None else [id_features, negative_features]
    if any(table.ndim != 2 or table.shape[-1] != features.shape[-1] or not len(table) for table in tables):
        shapes = [tuple(table.shape) for table in tables]
        raise ValueError(f"features are {tuple(features.shape)}, those of names {shapes}: give rows of one width")
    if not bool(features.isfinite().all()):
        raise ValueError("features have numbers that are nan or infinite: leave these rows out")
    rows = F.normalize(features.double(), dim=-1)
    logits = [rows @ F.normalize(table.double(), dim=-1).T / temperature for table in tables]
    predicted = logits[0].argmax(-1)
    if negative_features is None:
        return Scored(logits[0].softmax(-1).amax(-1), predicted)
    split = random_groups(len(negative_features), groups, seed)
    return Scored(grouped_share(logits[0], logits[1], split), predicted)


def grouped_share(id_logits: Tensor, negative_logits: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """The mean over groups of the share of the classes, sigmoid(logsumexp z_ID - logsumexp z_g).

    Args:
        id_logits: z_ID [N, C].
        negative_logits: z of the negative labels [N, M].
        groups: The indices of the negatives of each group.

    Returns:
        [N].
    """
    mass = id_logits.logsumexp(-1)
    shares = [torch.sigmoid(mass - negative_logits[:, group].logsumexp(-1)) for group in groups]
    return torch.stack(shares).mean(0)


def random_groups(count: int, groups: int, seed: int = 0) -> list[Tensor]:
    """Indices of `count` negatives in groups whose sizes differ by one at most.

    Raises:
        ValueError: There are fewer negatives than groups, or no group.
    """
    check_count("groups", groups, 1)
    if groups > count:
        raise ValueError(f"groups is {groups}, but there are {count} negative labels: choose at most as many")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return list(order.tensor_split(groups))
