"""Loss compared with the size of the compressed text: a low loss on easily compressed text is not evidence."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import compress

import torch
from torch import Tensor

from ...ops import Stats
from .base import score
from .likelihood import loss


@score(higher_is="negative")
def zlib(stats: Stats, texts: Sequence[str]) -> Tensor:
    """Loss divided by the number of bytes of the compressed text.

        loss / bytes of zlib(text)

    Source: Carlini et al. 2021, arXiv:2012.07805.
    """
    sizes = [len(compress(text.encode())) for text in texts]
    return loss(stats) / torch.tensor(sizes, dtype=torch.float64)
