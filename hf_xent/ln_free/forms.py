"""The forms of a model whose norms can be removed, told by what is in it.

    normalized   a stock model
    removable    `wrap` made it so: as far as removal has got, and in a checkpoint of training
    eps trick    a stock model whose eps drowns the variance
    true         no norms at all: a class of its own

`hf_xent.ln_free.convert` goes from one to another.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import nn

from .modeling_ln_free import PREFIX, LNFree
from .norms import FORMER_SHARE, FakeNorm
from .structure import trace

STATE = (".sigma", ".removed_share", f".{FORMER_SHARE}")
"""How names of removable norms' buffers end in a checkpoint."""


@lru_cache
def class_of(stock: Any) -> type:
    """The stock class of an architecture, without norms, and with a configuration of its own."""
    common = {"__module__": __name__}
    name, model_type = stock.config_class.__name__, PREFIX + stock.config_class.model_type
    of_config = {"__doc__": "Of a model without norms.", "model_type": model_type, **common}
    config = type(f"LNFree{name}", (stock.config_class,), of_config)
    return type(
        f"LNFree{stock.__name__}", (LNFree, stock), {"__doc__": "Without norms.", "config_class": config, **common}
    )


def form_of(model: Any) -> str:
    """The form of a causal LM.

    Args:
        model: A causal LM of transformers.

    Returns:
        'removable' (wrapped), 'true', 'eps trick' or 'normalized'.
    """
    if any(isinstance(m, FakeNorm) for m in model.modules()):
        return "removable"
    if hasattr(model.config, "ln_free"):
        return "true"
    return "eps trick" if is_ln_free(model) else "normalized"


def is_ln_free(model: nn.Module) -> bool:
    """Whether nothing in a causal LM normalizes: norms are removed, folded away, or drowned by their eps.

    Runs a few tokens: what counts is what its modules do, whatever they are called.

    Args:
        model: A causal LM of transformers in any form; it is left as it was.

    Returns:
        False if any norm depends on the scale of its input.
    """
    if any(not m.removed for m in model.modules() if isinstance(m, FakeNorm)):
        return False
    traced = trace(model)
    return not traced.others and not any(norm.acts for norm in traced.norms)
