"""Floor 1: losses of classifiers, as functions of a few logits a row and, where they need it, columns of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..registry import Registry

if TYPE_CHECKING:  # loaded on first access, as the losses are: a list of their names needs no torch
    from .base import ClassLoss

LOSSES: Registry[type[ClassLoss]] = Registry("loss", {"aspects": "aspects:Aspects"}, package=__name__)
"""Name -> loss."""

_HOMES = {"ClassLoss": "base", "predict": "heads", "resize": "heads"}


def get(loss: str | ClassLoss, **options: Any) -> ClassLoss:
    """A loss of classes by name.

    Args:
        loss: A name of `LOSSES`, with options if any: 'aspects:questions=8'; a `ClassLoss` is returned unchanged.
        options: Further options of the loss.

    Returns:
        The loss.

    Raises:
        ValueError: The name is unknown, the loss does not have or does not accept an option, or options stand beside
            a loss that is an object.
    """
    from .base import ClassLoss

    found: ClassLoss = LOSSES.instance(loss, ClassLoss, **options)
    return found


__all__ = sorted(("LOSSES", *LOSSES.exported, *_HOMES, "get"))


def __getattr__(name: str) -> Any:
    return LOSSES.attribute(name, _HOMES)
