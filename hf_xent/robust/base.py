"""The base of attacks: a dataclass of options whose `find` searches the ball around each row for another class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..options.ranges import check_fields
from .ascent import Found
from .ball import Ball
from .inputs import Target


@dataclass(frozen=True)
class Attack:
    """An attack; its options are checked when it is made."""

    ranges: ClassVar[dict[str, str]] = {}
    """The interval of each option that is a number."""

    def __post_init__(self) -> None:
        check_fields(self, self.ranges)

    def find(self, target: Target, ball: Ball, steps: int, generator: torch.Generator) -> Found:
        """Looks for inputs that the model takes for another class.

        Args:
            target: The model and its batch, all of whose rows are right before the attack.
            ball: What may be changed.
            steps: The forward and backward passes of a row, at most; one more forward pass looks at the last point.
            generator: Where random numbers are from, on the CPU.

        Returns:
            The inputs; `done` are the rows that have flipped.
        """
        raise NotImplementedError


def flipped(logits: Tensor, labels: Tensor) -> Tensor:
    """Which rows [B] are not the class of their label; of equal logits the first one counts, as in `argmax`."""
    return logits.argmax(-1) != labels


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of the label less the largest other one [B]: below 0 for rows that are wrong."""
    right = logits.gather(-1, labels[:, None])
    others = logits.scatter(-1, labels[:, None], -torch.inf)
    return right.squeeze(-1) - others.amax(-1)
