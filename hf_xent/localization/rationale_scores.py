"""How good weights of tokens are: does the classifier follow them, and do they point to the evidence?

    r                    the k words of a text with the largest weights, k = ceil(share n)
    comprehensiveness    p(y | x) - p(y | x without r)        high: what was found is needed
    sufficiency          p(y | x) - p(y | r)                  low: what was found is enough
                         means over shares; y is the predicted class; tokens are left out, not replaced
    average precision, precision, recall, F1, IoU    of the words, against known evidence

The first two ask about the classifier, and do not know what is right: a classifier that goes by the position of a comma
is explained well by that comma. The others need evidence that is known, and blame weights for what the classifier does
not use. Texts with words missing are no texts that the classifier was trained on, so compare with random weights.

Source: DeYoung et al. 2020, ERASER, arXiv:1911.03429, sections 4.1 and 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..models.contexts import eval_mode
from ..options.ranges import is_number

SHARES = (0.05, 0.1, 0.2, 0.5)


def without(inputs: Mapping[str, Tensor], left_out: Tensor, pad_id: int = 0) -> dict[str, Tensor]:
    """The texts without some of their tokens, and padding at the end for what is missing.

    Args:
        inputs: `input_ids` [B, T], `attention_mask` [B, T] or none, and what else has a value for each token.
        left_out: True where a token goes [B, T].
        pad_id: The id of padding; classifiers that read the last token look for it.

    Returns:
        The same names and `attention_mask`, [B, T'] with the length of the longest text that remains. A text that loses
        all its tokens has one token of padding that is attended to.
    """
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    kept, found = mask.bool() & ~left_out, {}
    empty = ~kept.any(1)
    for name, x in {**inputs, "attention_mask": mask}.items():
        fill = pad_id if name == "input_ids" else 0
        rows = [row[keep] for row, keep in zip(x, kept, strict=True)]
        for i in empty.nonzero()[:, 0].tolist():
            rows[i] = x.new_full((1,), 1 if name == "attention_mask" else fill)
        found[name] = pad_sequence(rows, batch_first=True, padding_value=fill)
    return found


@torch.no_grad()
def faithfulness(
    model: Any, inputs: Mapping[str, Tensor], weights: Tensor, words: Tensor, shares: Sequence[float] = SHARES
) -> dict[str, Tensor]:
    """How much the probability of the predicted class falls without the rationale, and with the rationale alone.

    Args:
        model: A classifier of texts.
        inputs: `input_ids` [B, T], `attention_mask` [B, T], and what else has a value for each token.
        weights: Weights of the tokens [B, T], larger for those of the rationale; of equal ones the first.
        words: True where a token may be in a rationale [B, T]; special tokens stay in all texts.
        shares: The sizes of the rationale, as shares of the words, in (0, 1].

    Returns:
        `comprehensiveness` [B] and `sufficiency` [B], means over the shares.

    Raises:
        ValueError: No shares, or one out of range.
    """
    for share in shares or (0,):
        if not is_number(share, "(0, 1]"):
            raise ValueError(f"shares has {share}: choose shares of the words in (0, 1]")
    pad_id = model.config.pad_token_id or 0
    with eval_mode(model):
        p = model(**inputs).logits.float().softmax(-1)
        y = p.argmax(-1, keepdim=True)
        falls: dict[str, list[Tensor]] = {"comprehensiveness": [], "sufficiency": []}
        for share in shares:
            chosen = top_words(weights, words, (share * words.sum(1)).ceil().long())
            for name, left_out in zip(falls, (chosen, words & ~chosen), strict=True):
                q = model(**without(inputs, left_out, pad_id)).logits.float().softmax(-1)
                falls[name].append((p - q).gather(1, y)[:, 0])
    return {name: torch.stack(parts).mean(0) for name, parts in falls.items()}


def top_words(weights: Tensor, words: Tensor, counts: Tensor) -> Tensor:
    """The words with the largest weights: True for `counts` [B] of each text, or all if it has fewer; [B, T]."""
    order = weights.detach().double().masked_fill(~words, -torch.inf).argsort(stable=True, dim=1, descending=True)
    return (order.argsort(1) < counts[:, None]) & words


def evidence_scores(
    weights: Tensor, evidence: Tensor, words: Tensor, threshold: float | None = None
) -> dict[str, Tensor]:
    """How well weights find words that are known to be evidence.

    Args:
        weights: Weights of the tokens [B, T].
        evidence: True where a token is evidence [B, T].
        words: True where a token counts [B, T].
        threshold: A word with at least this weight is in the rationale; if None, it has as many words as the evidence,
            and precision, recall and F1 are the same number.

    Returns:
        `average precision`, `precision`, `recall`, `F1` and `IoU`, [B] each in float64; nan for texts without evidence.
        An empty rationale has a precision of 0.
    """
    truth = evidence & words
    counts = truth.sum(1)
    chosen = top_words(weights, words, counts) if threshold is None else words & (weights.detach() >= threshold)
    hit, size = (truth & chosen).sum(1).double(), chosen.sum(1)
    found = {
        "average precision": torch.stack([_average_precision(*row) for row in zip(weights, truth, words, strict=True)]),
        "precision": hit / size.clamp(min=1), "recall": hit / counts, "F1": 2 * hit / (size + counts),
        "IoU": hit / (truth | chosen).sum(1),
    }  # fmt: skip
    return {name: value.masked_fill(counts == 0, torch.nan) for name, value in found.items()}


def _average_precision(weights: Tensor, truth: Tensor, words: Tensor) -> Tensor:
    """sum_n (R_n - R_{n-1}) P_n over thresholds, so that words of equal weight count together; no interpolation."""
    values, truth = weights.detach().double()[words], truth[words]
    above = values[None] >= values[:, None]  # [n, n]: what a threshold at each word finds
    precision = (above & truth).sum(1) / above.sum(1)
    return precision[truth].double().mean()
