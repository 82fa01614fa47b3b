"""Floor 1: objectives written over statistics, one file a loss, registered by hand. Needs torch alone."""

from __future__ import annotations

from typing import Any

from . import catalog
from .base import Loss
from .comp_sum import CompSum
from .cross_entropy import CrossEntropy, linear_cross_entropy
from .eisl import EISL
from .emo import EMO
from .focal import Focal
from .forward_kl import ForwardKL
from .jsd import JSD
from .mixce import MixCE
from .reverse_kl import ReverseKL
from .tailr import TaiLr

LOSSES: dict[str, type[Loss]] = {
    "cross_entropy": CrossEntropy,
    "focal": Focal,
    "comp_sum": CompSum,
    "tailr": TaiLr,
    "mixce": MixCE,
    "emo": EMO,
    "eisl": EISL,
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jsd": JSD,
}


def get(loss: str | Loss | None, **options: Any) -> Loss:
    """A loss by registry name (with its fields as options) or as it is; None is plain cross-entropy.

    Options may follow the name, 'focal:gamma=3' or 'eisl:ngrams=(1, 2), ce_factor=0.5'; those given as text, here or by
    keyword, are read as Python literals, else as words.

    Raises: ValueError for an unknown name, or an option that the loss does not have or does not accept.
    """
    if isinstance(loss, Loss):
        if options:
            raise ValueError(f"loss is an object, {loss!r}: set {', '.join(options)} on it, not beside it")
        return loss
    return catalog.build(LOSSES, loss or "cross_entropy", options)


def table() -> list[dict[str, Any]]:
    """One row a registered loss, for help texts and the README; its keys are those of `catalog.row`."""
    return [catalog.row(name, loss) for name, loss in LOSSES.items()]


__all__ = [
    "EISL",
    "EMO",
    "JSD",
    "LOSSES",
    "CompSum",
    "CrossEntropy",
    "Focal",
    "ForwardKL",
    "Loss",
    "MixCE",
    "ReverseKL",
    "TaiLr",
    "get",
    "linear_cross_entropy",
    "table",
]
