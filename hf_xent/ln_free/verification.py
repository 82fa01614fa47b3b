"""What must hold of a model without norms, measured: nothing in it normalizes, and it generates as any other.

cache      logits of greedy generation with the KV cache against those without
padding    of a prompt padded on the left, in a batch, against the prompt alone
parity     of random tokens, against another model (the one it was converted from)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.contexts import eval_mode_without_autocast
from .convert import form_of, parity
from .norms import is_ln_free
from .structure import random_tokens


@dataclass(frozen=True)
class Verification:
    """Largest differences of logits, absolute, and the largest logit; `parity` is nan without another model."""

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
        """LN-free, and every difference within the tolerance of the dtype, relative to the largest logit."""
        tolerance = 1e-4 if self.dtype == "float32" else 5e-2
        errors = [self.cache, self.padding, *([] if math.isnan(self.parity) else [self.parity])]
        return self.ln_free and all(error <= tolerance * max(1.0, self.logits) for error in errors)

    def as_dict(self) -> dict[str, Any]:
        """The fields and the verdict, for JSON."""
        return {**asdict(self), "passed": self.passed}


def verify(model: Any, other: Any = None, *, tokens: int = 8) -> Verification:
    """Check a causal LM in any form, against another if given, on random prompts and so many generated tokens.

    Raises: ValueError for no tokens.
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
        cache=_apart(full, _generated(model, ids, torch.ones_like(ids), tokens, use_cache=False)),
        padding=_apart(alone, _generated(model, ids, mask, tokens)[:1]),
        parity=difference,
        logits=largest,
    )


def _generated(model: Any, ids: Tensor, mask: Tensor, tokens: int, use_cache: bool = True) -> Tensor:
    """Logits [B, tokens, V] of greedy generation."""
    settings = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
    found = model.generate(
        ids,
        attention_mask=mask,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    return torch.stack(found.logits, 1).float()


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
