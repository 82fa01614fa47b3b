"""Floor 1: vectors of numbers as digits: a quantiser of each dimension, and a head that predicts digit after digit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..system.offered import offered

if TYPE_CHECKING:  # loaded on first access: torch takes a second
    from .head import DigitHead as DigitHead
    from .model import DigitModel as DigitModel
    from .model import DigitModelConfig as DigitModelConfig
    from .model import DigitModelOutput as DigitModelOutput
    from .quantiles import Quantiles as Quantiles

_HOMES = {
    "DigitHead": ".head",
    **dict.fromkeys(("DigitModel", "DigitModelConfig", "DigitModelOutput"), ".model"),
    "Quantiles": ".quantiles",
}
"""Public name -> the module that has it."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    return offered(__name__, _HOMES, name)
