"""Floor 1: probabilities that are right as often as they say, from the scores of a classifier that stays as it is.

calibrator = calibration.fit(scores, labels, views)      # scores [M, K]: logits; views [V, M, K]: of changed inputs
probs = calibrator(scores, views)                        # [M, K], with the same largest class
calibration.report(probs, labels)                        # accuracy, ECE, KS, Brier, NLL, AUROC
"""

from typing import TYPE_CHECKING, Any

from ..system.offered import offered

if TYPE_CHECKING:  # loaded on first access: torch takes a second
    from .calibrator import Calibrator
    from .fitting import Training, fit
    from .objectives import OBJECTIVES
    from .reports import draw, report

__all__ = ["OBJECTIVES", "Calibrator", "Training", "draw", "fit", "report"]

_HOMES = {
    "Calibrator": ".calibrator",
    "OBJECTIVES": ".objectives",
    **dict.fromkeys(("Training", "fit"), ".fitting"),
    **dict.fromkeys(("draw", "report"), ".reports"),
}
"""Public name -> the module that has it."""


def __getattr__(name: str) -> Any:
    return offered(__name__, _HOMES, name)
