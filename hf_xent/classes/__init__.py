"""Floor 1: losses of classifiers, as functions of a few logits a row and of what else they say that they need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..registry import Registry

if TYPE_CHECKING:  # loaded on first access, as the losses are: a list of their names needs no torch
    from .base import ClassLoss

LOSSES: Registry[type[ClassLoss]] = Registry(
    "loss",
    {
        "aspects": "aspects:Aspects",
        "bias": "bias:Bias",
        "core_tuning": "core_tuning:CoreTuning",
        "dice": "dice:Dice",
        "hl_gauss": "hl_gauss:HLGauss",
        "hybrid": "hybrid:Hybrid",
        "marginal_entropy": "marginal_entropy:MarginalEntropy",
        "ordinal": "ordinal:Ordinal",
        "pairs": "pairs:Pairs",
        "pairwise_gain": "pairwise_gain:PairwiseGain",
        "smooth_adversarial": "smooth_adversarial:SmoothAdversarial",
        "squared_error": "squared_error:SquaredError",
        "supcon": "supcon:SupCon",
        "svm": "svm:SVM",
        "symmetric_ce": "symmetric_ce:SymmetricCE",
        "tversky": "tversky:Tversky",
        "two_hot": "two_hot:TwoHot",
    },
    package=__name__,
)
"""Name -> loss."""
OF_STATISTICS = (
    "cross_entropy", "focal", "comp_sum", "tailr", "mixce", "forward_kl", "reverse_kl", "jsd", "skew_kl",
    "total_variation",
)  # fmt: skip
"""The losses of tokens (`hf_xent.losses`) that are losses of classes, too, under the same names."""

_HOMES = {
    "ClassLoss": "base",
    "OfStatistics": "of_statistics",
    "predict": "heads",
    "resize": "heads",
    "return_values": "value_outputs",
    "ssim": "structure",
    "supervised_contrastive": "supcon",
}


def get(loss: Any, **options: Any) -> ClassLoss:
    """A loss of classes by name.

    Args:
        loss: A name of `LOSSES`, or of a loss of tokens such as 'cross_entropy' or 'focal', with options if any:
            'aspects:questions=8'; a `ClassLoss` is returned unchanged, a `hf_xent.losses.Loss` as one of classes.
        options: Further options of the loss.

    Returns:
        The loss.

    Raises:
        ValueError: The name is unknown, the loss does not have or does not accept an option, or options stand beside
            a loss that is an object.
    """
    from ..losses import Loss
    from ..losses import get as token_loss
    from .base import ClassLoss
    from .of_statistics import OfStatistics

    name = loss.describe()["loss"] if isinstance(loss, Loss) else str(loss).partition(":")[0]
    if name in OF_STATISTICS:
        return OfStatistics(token_loss(loss, **options))
    if isinstance(loss, str | Loss) and name not in LOSSES:
        raise ValueError(f"loss is {name!r}: choose one of {', '.join([*LOSSES, *OF_STATISTICS])}, or pass an object")
    found: ClassLoss = LOSSES.instance(loss, ClassLoss, **options)
    return found


def table() -> list[dict[str, Any]]:
    """The losses of classes as a table, read from their files without importing them, as `hf_xent.losses.table`.

    A row has, beside what is there, `labels` ('classes', 'values' or 'masks') and `needs`, as `ClassLoss` has them.
    """
    from ..losses import LOSSES as TOKEN_LOSSES

    rows = []
    for name in LOSSES:
        constants = LOSSES.constants(name)
        rows.append({**LOSSES.row(name), "labels": constants["labels"], "needs": list(constants["needs"])})
    for name in OF_STATISTICS:
        needs = ["second"] if TOKEN_LOSSES.constants(name)["needs_teacher"] else []
        rows.append({**TOKEN_LOSSES.row(name), "labels": "classes", "needs": needs})
    return rows


__all__ = sorted(("LOSSES", "OF_STATISTICS", *LOSSES.exported, *_HOMES, "get", "table"))


def __getattr__(name: str) -> Any:
    return LOSSES.attribute(name, _HOMES)
