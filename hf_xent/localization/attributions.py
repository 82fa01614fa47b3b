"""Weights of tokens without training a mask: what rationales are compared with.

    gradient_input   |e_t . d z_y / d e_t|         one backward pass; e_t is the token's embedding
    last_attention   mean over heads of A[q, t]    attention in the last layer to t, of the token q that is read
    occlusion        z_y - z_y without token t     one pass for each token of a text: exact for single tokens, and slow
    log_odds         odds of the token in training texts of the class, against those in others; no network

Each of the first three returns weights [B, T] for the class y of each text, the predicted one if labels are None. What
they have at special tokens and padding means nothing; `hf_xent.localization.word_tokens` tells which tokens are words.

Source: Simonyan et al. 2014, arXiv:1312.6034 (gradients); Li et al. 2016, arXiv:1612.08220 (erasure).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.contexts import eval_mode
from .rationale_scores import without


def gradient_input(model: Any, inputs: Mapping[str, Tensor], labels: Tensor | None = None) -> Tensor:
    """The size of embedding times gradient, summed over dimensions; without the sign, which is that of a linear model.

    Args:
        model: A classifier of texts; its parameters get no gradient.
        inputs: `input_ids` [B, T], `attention_mask` [B, T], and what else the classifier takes.
        labels: Ids of classes [B].

    Returns:
        Weights [B, T].
    """
    found: list[Tensor] = []

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1]

    with eval_mode(model), torch.enable_grad():
        handle = model.get_input_embeddings().register_forward_hook(hook)
        try:
            logits = model(**inputs).logits
        finally:
            handle.remove()
        [gradient] = torch.autograd.grad(_of_class(logits, labels).sum(), found[-1:])
    return (gradient * found[-1].detach()).sum(-1).abs()


@torch.no_grad()
def last_attention(model: Any, inputs: Mapping[str, Tensor], query: int = 0) -> Tensor:
    """Attention in the last layer of one token to all others, a mean over heads.

    Args:
        model: A classifier of texts whose attention is computed by torch: `attn_implementation="eager"`.
        inputs: `input_ids` [B, T], `attention_mask` [B, T], and what else the classifier takes.
        query: The token that attends: 0 is the first, which most encoders read; -1 the last one that is no padding,
            which decoders read.

    Returns:
        Weights [B, T].

    Raises:
        ValueError: Another query, or a model that returns no attention.
    """
    if query not in (0, -1):
        raise ValueError(f"query is {query}: choose 0, the first token, or -1, the last one")
    with eval_mode(model):
        attentions = getattr(model(**inputs, output_attentions=True), "attentions", None)
    if not attentions or attentions[-1] is None:
        raise ValueError("the model returns no attention: call model.set_attn_implementation('eager') before")
    heads = attentions[-1].mean(1)  # [B, T, T]
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    places = torch.arange(mask.shape[1], device=mask.device)
    at = torch.zeros_like(mask[:, 0]) if query == 0 else (mask * places).argmax(-1)
    return heads[torch.arange(len(heads), device=at.device), at]


@torch.no_grad()
def occlusion(
    model: Any, inputs: Mapping[str, Tensor], words: Tensor, labels: Tensor | None = None, batch_size: int = 64
) -> Tensor:
    """What the logit of the class loses if one word is left out of the text, for each word.

    Args:
        model: A classifier of texts.
        inputs: `input_ids` [B, T], `attention_mask` [B, T], and what else has a value for each token.
        words: True where a token is left out in turn [B, T]; the others have a weight of 0.
        labels: Ids of classes [B].
        batch_size: How many texts a pass has.

    Returns:
        Weights [B, T].
    """
    weights = torch.zeros(words.shape, device=words.device)
    with eval_mode(model):
        logits = model(**inputs).logits
        labels = logits.argmax(-1) if labels is None else labels
        whole = _of_class(logits, labels)
        for part in words.nonzero().split(batch_size):
            rows, places = part.T
            one = torch.nn.functional.one_hot(places, words.shape[1]).bool()
            fewer = without({name: x[rows] for name, x in inputs.items()}, one)
            weights[rows, places] = (whole[rows] - _of_class(model(**fewer).logits, labels[rows])).float()
    return weights


def log_odds(rows: Sequence[Sequence[int]], labels: Sequence[int], vocabulary: int, classes: int) -> Tensor:
    """How much more often a token is in texts of a class than in the others: log odds, by shares of texts + 1/2.

        log (n_cv + 1/2) / (N_c + 1) - log (n_v - n_cv + 1/2) / (N - N_c + 1)        n: texts with the token v

    Args:
        rows: The ids of the tokens of each text.
        labels: The class of each text.
        vocabulary: How many ids there are.
        classes: How many classes there are.

    Returns:
        A table [classes, vocabulary]; weights of texts are `table[labels[:, None], input_ids]`.
    """
    counts, texts = torch.zeros(classes, vocabulary), torch.zeros(classes, 1)
    for row, label in zip(rows, labels, strict=True):
        counts[label, sorted(set(row))] += 1
        texts[label] += 1
    return ((counts + 0.5) / (texts + 1)).log() - ((counts.sum(0) - counts + 0.5) / (texts.sum() - texts + 1)).log()


def _of_class(logits: Tensor, labels: Tensor | None) -> Tensor:
    """The logit of the class of each row [B]."""
    labels = logits.argmax(-1) if labels is None else labels
    return logits.gather(-1, labels[:, None])[:, 0]
