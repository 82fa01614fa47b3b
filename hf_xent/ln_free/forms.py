"""The forms of a model whose norms can be removed, recognized by its modules.

    normalized   a stock model
    removable    a model that `wrap` has changed, during and after removal; also a checkpoint of training
    eps trick    a stock model whose eps is so large that the variance has no effect
    true         a model without norms, of a separate class

`hf_xent.ln_free.convert` converts between them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import nn

from .modeling_ln_free import PREFIX, LNFree
from .norms import FORMER_SHARE, FakeNorm
from .structure import trace

STATE = (".sigma", ".removed_share", f".{FORMER_SHARE}")
"""The suffixes of the names of removable norms' buffers in a checkpoint."""


@lru_cache
def class_of(stock: Any) -> type:
    """A class like the stock one of an architecture, but without norms and with its own configuration class."""
    common = {"__module__": __name__}
    name, model_type = stock.config_class.__name__, PREFIX + stock.config_class.model_type
    config_members = {"__doc__": "Configuration of a model without norms.", "model_type": model_type, **common}
    config = type(f"LNFree{name}", (stock.config_class,), config_members)
    members = {"__doc__": "A model without norms.", "config_class": config, **common}
    return type(f"LNFree{stock.__name__}", (LNFree, stock), members)


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
    """Whether nothing in a causal LM normalizes: its norms are removed, folded away, or have a huge eps.

    Runs a few tokens: what its modules compute decides, whatever their names.

    Args:
        model: A causal LM of transformers in any form; it is not changed.

    Returns:
        False if any norm depends on the scale of its input.
    """
    if any(not m.removed for m in model.modules() if isinstance(m, FakeNorm)):
        return False
    traced = trace(model)
    return not traced.others and not any(norm.acts for norm in traced.norms)
