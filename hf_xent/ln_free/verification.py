"""Checks of a model without norms: nothing in it normalizes, and it generates correctly. Logits are compared:

cache      of greedy generation with the KV cache and without it
padding    of a prompt that is padded on the left in a batch, and of the prompt alone
parity     of random tokens, with another model (the one it was converted from)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.anatomy import random_tokens
from ..models.contexts import eval_mode_without_autocast
from .forms import form_of, is_ln_free


@dataclass(frozen=True)
class Verification:
    """The largest absolute differences of logits, and the largest logit; `parity` is nan without another model."""

    model: str
    form: str
    dtype: str
    ln_free: bool
    cache: float
    padding: float
    parity: float
    logits: float

    @property
    def passed(self) -> bool:
        """Whether it is LN-free and every difference, relative to the largest logit, within the dtype's tolerance."""
        tolerance = 1e-4 if self.dtype == "float32" else 5e-2
        errors = [self.cache, self.padding, *([] if math.isnan(self.parity) else [self.parity])]
        return self.ln_free and all(error <= tolerance * max(1.0, self.logits) for error in errors)

    def as_dict(self) -> dict[str, Any]:
        """The fields and the verdict, for JSON."""
        return {**asdict(self), "passed": self.passed}


@torch.no_grad()
def parity(a: nn.Module, b: nn.Module, ids: Tensor | None = None) -> tuple[float, float]:
    """The largest difference between two models' logits.

    Args:
        a: A causal LM.
        b: Another one, with the same vocabulary.
        ids: Token ids [B, T] to compare on; None is 32 random ones.

    Returns:
        The largest absolute difference, and the first model's largest logit. Sequences in which the first overflows
        are left out; both are nan if it always does.
    """
    logits = []
    for model in (a, b):
        tokens = random_tokens(model, 2, 16) if ids is None else ids.to(next(model.parameters()).device)
        with eval_mode_without_autocast(model):
            logits.append(model(input_ids=tokens).logits.float().cpu())
    finite = logits[0].flatten(1).isfinite().all(1)
    if not finite.any():
        return float("nan"), float("nan")
    first, second = (x[finite] for x in logits)
    return float((first - second).abs().max()), float(first.abs().max())


def verify(model: Any, other: Any = None, *, tokens: int = 8) -> Verification:
    """Checks a causal LM in any form on random prompts.

    Args:
        model: The model without norms.
        other: The model with which it has to agree, such as the one it was converted from; None skips this check.
        tokens: The number of tokens that are generated.

    Returns:
        The largest differences, and whether they are small enough (`passed`).

    Raises:
        ValueError: `tokens` is below 1.
    """
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}: choose 1 or more")
    with eval_mode_without_autocast(model):
        return _verified(model, other, tokens)


def _verified(model: Any, other: Any, tokens: int) -> Verification:
    ids = random_tokens(model, 2, 9)
    short, mask = ids[:1, 4:], torch.ones_like(ids)
    mask[0, :4] = 0
    full = _generated(model, ids, torch.ones_like(ids), tokens)
    alone = _generated(model, short, torch.ones_like(short), tokens)
    difference, largest = (float("nan"), float(full.abs().max()))
    if other is not None:
        difference, largest = parity(other, model)
    return Verification(
        model=type(model).__name__,
        form=form_of(model),
        dtype=str(model.dtype).removeprefix("torch."),
        ln_free=is_ln_free(model),
        cache=_distance(full, _generated(model, ids, torch.ones_like(ids), tokens, use_cache=False)),
        padding=_distance(alone, _generated(model, ids, mask, tokens)[:1]),
        parity=difference,
        logits=largest,
    )


def _generated(model: Any, ids: Tensor, mask: Tensor, tokens: int, use_cache: bool = True) -> Tensor:
    """Logits [B, tokens, V] of greedy generation."""
    settings = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
    generated = model.generate(
        ids,
        attention_mask=mask,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    return torch.stack(generated.logits, 1).float()


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
