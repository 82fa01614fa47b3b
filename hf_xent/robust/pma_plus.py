"""PMA+: PMA, then APGD towards several classes for the rows that are still right.

    PMA with half of the steps;  APGD-T with the other half on the rows that PMA has not flipped

`steps` are the forward and backward passes of a row in both together, so that attacks compare at equal steps: a row
that PMA flips has at most half of them. `share` moves the border.

Source: Xie et al. 2024, arXiv:2411.15210; Croce and Hein 2020, arXiv:2003.01690.
Relations: `pma` is the first part; `apgd:loss=targeted` the second one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .apgd import APGD
from .ascent import Found
from .ball import Ball
from .base import Attack, Search, in_turn
from .inputs import Target
from .pma import PMA


@dataclass(frozen=True)
class PMAPlus(Attack):
    """PMA, then APGD-T on what it has not flipped; see the module's docstring."""

    share: float = 0.5
    """The share of the steps that PMA has."""
    restarts: int = 1
    """Of PMA."""
    towards: bool = True
    """Of PMA: whether its step 0 goes towards the label."""
    targets: int = 9
    """Of APGD-T."""
    ranges: ClassVar[dict[str, str]] = {"share": "(0, 1)"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._parts()

    def find(self, target: Target, ball: Ball, steps: int, seed: int) -> Found:
        """As `Attack.find`."""
        first = min(steps, max(1, round(self.share * steps)))
        parts = zip(self._parts(), (first, steps - first), strict=True)
        return in_turn(target, ball, [_search(part, count, seed) for part, count in parts if count], self.leave)

    def _parts(self) -> tuple[Attack, Attack]:
        return (
            PMA(leave=self.leave, restarts=self.restarts, towards=self.towards),
            APGD(leave=self.leave, loss="targeted", targets=self.targets),
        )


def _search(attack: Attack, steps: int, seed: int) -> Search:
    return lambda target, ball, rows: attack.find(target, ball, steps, seed)
