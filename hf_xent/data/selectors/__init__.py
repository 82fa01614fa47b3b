"""Ways to rank texts by how well they fit a target: one file each, and one line in `SELECTORS`.

`hf_xent.data.selectors.SELECTORS.table()` lists every selector's formula and source; `length.py` is an example for a
new one. `hf_xent.data.select` ranks with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...registry import Registry

if TYPE_CHECKING:  # loaded on first access to a selector: help texts that list the names need no NumPy
    from .base import Selector

SELECTORS: Registry[type[Selector]] = Registry(
    "selector",
    {
        "compression": "compression:Compression",
        "length": "length:Length",
        "loss": "loss:Loss",
        "ngrams": "ngrams:NGrams",
        "random": "random:Random",
    },
    package=__name__,
)
"""Name -> selector."""


def get(by: Any, **options: Any) -> Selector:
    """A selector by name.

    Args:
        by: A name of `SELECTORS`, with options if any: 'compression:level=1'; a `Selector` is returned unchanged.
        **options: Further options of the selector.

    Returns:
        The selector.

    Raises:
        ValueError: The name is unknown, the selector does not have or does not accept an option, or options stand
            beside an object.
    """
    from .base import Selector

    try:
        found: Selector = SELECTORS.instance(by, Selector, **options)
    except ValueError as error:  # the selector's own message is enough; the registry's repeats the values, losses too
        raise error.__cause__ or error  # noqa: B904  the cause itself is raised
    return found


__all__ = sorted(("SELECTORS", "Selector", *SELECTORS.exported, "get"))


def __getattr__(name: str) -> Any:
    return SELECTORS.attribute(name, {"Selector": "base"})
