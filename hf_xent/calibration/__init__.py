"""Floor 1: probabilities that are right as often as they say, from the scores of a classifier that stays as it is.

calibrator = calibration.fit(scores, labels, views)      # scores [M, K]: logits; views [V, M, K]: of changed inputs
probs = calibrator(scores, views)                        # [M, K], with the same largest class
calibration.report(probs, labels)                        # accuracy, ECE, KS, Brier, NLL, AUROC
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # loaded on first access: torch takes a second
    from .calibrator import Calibrator
    from .fitting import Training, fit
    from .objectives import OBJECTIVES
    from .reports import draw, report

__all__ = ["OBJECTIVES", "Calibrator", "Training", "draw", "fit", "report"]

_HOMES = {
    "Calibrator": "calibrator",
    "OBJECTIVES": "objectives",
    **dict.fromkeys(("Training", "fit"), "fitting"),
    **dict.fromkeys(("draw", "report"), "reports"),
}
"""Public name -> the file that has it."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
