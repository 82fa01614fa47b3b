"""Floor 4: the cross-entropy method: search of options, and probabilities of rare events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..system.offered import offered

if TYPE_CHECKING:  # loaded on first access: searches of trainers need torch and transformers
    from .dimensions import Categorical as Categorical
    from .dimensions import Integer as Integer
    from .dimensions import Real as Real
    from .method import CrossEntropyMethod as CrossEntropyMethod
    from .minimizing import Found as Found
    from .minimizing import minimize as minimize
    from .rare import Exponentials as Exponentials
    from .rare import RareEvent as RareEvent
    from .rare import estimate as estimate
    from .rare import probability as probability
    from .searching import SearchOptions as SearchOptions
    from .searching import search as search
    from .space import Space as Space
    from .trial import Trial as Trial

_HOMES = {
    **dict.fromkeys(("Categorical", "Integer", "Real"), ".dimensions"),
    "CrossEntropyMethod": ".method",
    **dict.fromkeys(("Found", "minimize"), ".minimizing"),
    **dict.fromkeys(("Exponentials", "RareEvent", "estimate", "probability"), ".rare"),
    **dict.fromkeys(("SearchOptions", "search"), ".searching"),
    "Space": ".space",
    "Trial": ".trial",
}
"""Public name -> the module that has it."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    return offered(__name__, _HOMES, name)
