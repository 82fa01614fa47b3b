"""Floor 1: losses as functions of statistics, one file per loss, registered by name. Needs only torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..registry import Registry

if TYPE_CHECKING:  # imported on first use, as the losses are: `hf-xent losses` needs no torch
    from .base import Loss
    from .cross_entropy import linear_cross_entropy as linear_cross_entropy

LOSSES: Registry[type[Loss]] = Registry(
    "loss",
    {
        "cross_entropy": "cross_entropy:CrossEntropy",
        "focal": "focal:Focal",
        "comp_sum": "comp_sum:CompSum",
        "tailr": "tailr:TaiLr",
        "mixce": "mixce:MixCE",
        "emo": "emo:EMO",
        "eisl": "eisl:EISL",
        "forward_kl": "forward_kl:ForwardKL",
        "reverse_kl": "reverse_kl:ReverseKL",
        "jsd": "jsd:JSD",
        "skew_kl": "skew_kl:SkewKL",
        "total_variation": "total_variation:TotalVariation",
        "universal_logit": "universal_logit:UniversalLogit",
        "gold": "gold:GOLD",
    },
    package=__name__,
)
"""Name -> loss."""

_OTHER_NAMES = {"Loss": "base", "linear_cross_entropy": "cross_entropy"}


def get(loss: str | Loss | None, **options: Any) -> Loss:
    """A loss by its registry name, with its fields as options; a loss object is returned unchanged.

    Args:
        loss: A name, with options after it as in 'focal:gamma=3' or 'eisl:ngrams=(1, 2), ce_factor=0.5'; or a loss,
            which is returned; None is plain cross-entropy.
        **options: Fields of the loss. Text values, here or in the name, are read as Python literals if they can
            be.

    Returns:
        The loss.

    Raises:
        ValueError: The name is unknown, or the loss does not have an option or does not accept its value.
    """
    from .base import Loss

    found: Loss = LOSSES.instance(loss or "cross_entropy", Loss, **options)
    return found


def table() -> list[dict[str, Any]]:
    """The registered losses as a table, read from their files without importing them, for help texts and the README.

    Returns:
        One row per loss: what `Registry.row` reads (`name`, `summary`, `formula`, `options`, `help`, `source`,
        `statistics`, ...), with its `class`.
    """
    return [{**row, "class": row["object"]} for row in LOSSES.table()]


__all__ = sorted(("LOSSES", *LOSSES.exported, *_OTHER_NAMES, "get", "table"))


def __getattr__(name: str) -> Any:
    return LOSSES.attribute(name, _OTHER_NAMES)
