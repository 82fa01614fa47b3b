"""Floor 1: objectives written over statistics, one file a loss, registered by hand. Needs torch alone."""

from __future__ import annotations

from typing import Any

from .base import Loss
from .cross_entropy import CrossEntropy

LOSSES: dict[str, type[Loss]] = {
    "cross_entropy": CrossEntropy,
}


def get(loss: str | Loss | None, **options: Any) -> Loss:
    """A loss by registry name (with its fields as options) or as it is; None is plain cross-entropy.

    Raises: ValueError for an unknown name or an option the loss does not have.
    """
    if isinstance(loss, Loss):
        if options:
            raise ValueError(f"loss is an object, {loss!r}: set {', '.join(options)} on it, not beside it")
        return loss
    name = loss or "cross_entropy"
    if name not in LOSSES:
        raise ValueError(f"loss is {name!r}: choose one of {', '.join(LOSSES)}, or pass a hf_xent.losses.Loss")
    try:
        return LOSSES[name](**options)
    except TypeError as error:
        known = ", ".join(LOSSES[name].__dataclass_fields__)  # type: ignore[attr-defined]
        raise ValueError(f"loss {name!r} does not take {', '.join(options)}: its options are {known or 'none'}") from error


__all__ = ["LOSSES", "CrossEntropy", "Loss", "get"]
