"""How good the answers of extractive question answering are: exact match, F1, and mAP@k of the positions.

    exact match    whether an answer equals one of the true ones, without case, punctuation, articles and extra space
    F1             2 P R / (P + R) of the words that an answer shares with a true one; the best over the true ones
    mAP@k          the mean over rows of 1 / rank of the first of the k likeliest positions that is in the window
                   [gold - tolerance, gold + tolerance); 0 if none is

The last is what the paper calls mAP@k: the relevant positions count as one, so that only the first hit matters, and it
is a mean reciprocal rank. Upwards the window is half open, as in the authors' code.

Source: Rajpurkar et al. 2016, arXiv:1606.05250; Carrino et al. 2023, arXiv:2309.17134, with the authors' code,
github.com/ccasimiro88/self-distillation-gxlt-qa.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """The text as SQuAD compares it: lower case, without ASCII punctuation, English articles and extra space."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1 if an answer equals one of the true ones, else 0; without true ones, 1 for the empty answer."""
    return float(normalized(answer) in [normalized(gold) for gold in golds or [""]])


def f1(answer: str, golds: Sequence[str]) -> float:
    """The F1 of an answer's words against the best of the true ones; without true ones, 1 for the empty answer."""
    return max(_f1(normalized(answer).split(), normalized(gold).split()) for gold in golds or [""])


def _f1(words: list[str], gold: list[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    shared = sum((Counter(words) & Counter(gold)).values())
    return 2 * shared / (len(words) + len(gold))


def map_at_k(
    logits: Tensor,  # [N, T]
    positions: Tensor,  # [N]
    k: int = 10,
    tolerance: int = 5,
) -> Tensor:
    """The mAP@k of positions; see the module's docstring.

    Args:
        logits: The logit of every position, [N, T]; padding has to have smaller ones than the rest.
        positions: The true position of every row, [N].
        k: How many of the likeliest positions count.
        tolerance: How far from the true position counts as a hit: from `tolerance` below to `tolerance` - 1 above.

    Returns:
        A number between 0 and 1, float32, without a gradient.
    """
    likeliest = logits.detach().topk(min(k, logits.shape[-1]), dim=-1).indices  # [N, k]
    gaps = likeliest - positions[:, None]
    is_hit = (gaps >= -tolerance) & (gaps < tolerance)
    rank = is_hit.float().argmax(-1) + 1  # of the first hit
    return (is_hit.any(-1) / rank).mean()
