"""The registry of attacks, beside the room's own file, which offers them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..registry import Registry

if TYPE_CHECKING:  # loaded on first access to an attack: help texts that list the names need no torch
    from .base import Attack

ATTACKS: Registry[type[Attack]] = Registry(
    "attack",
    {
        "pgd": "pgd:PGD",
        "pma": "pma:PMA",
        "apgd": "apgd:APGD",
        "pma_plus": "pma_plus:PMAPlus",
    },
    package=__package__ or "hf_xent.robust",
)
"""Name -> attack."""


def get(method: Any, **options: Any) -> Attack:
    """An attack by name.

    Args:
        method: A name of `ATTACKS`, with options if any: 'pgd:size=2'; an `Attack` is returned unchanged.
        **options: Further options of the attack.

    Returns:
        The attack.

    Raises:
        ValueError: The name is unknown, the attack does not have or does not accept an option, or options stand beside
            an object.
    """
    from .base import Attack

    found: Attack = ATTACKS.instance(method, Attack, **options)
    return found
