"""The base of attacks: a dataclass of options whose `find` searches the ball around each row for another class."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..options.ranges import check_fields
from .ascent import Found
from .ball import Ball
from .inputs import Target

Search = Callable[[Target, Ball, Tensor], Found]
"""An attack on the rows of a target that are left, within the balls around these; the last one says which they are."""


@dataclass(frozen=True)
class Attack:
    """An attack; its options are checked when it is made."""

    leave: bool = True
    """Whether rows that have flipped leave the batch; which rows flip is the same without, for more time."""
    ranges: ClassVar[dict[str, str]] = {}
    """The interval of each option that is a number."""

    def __post_init__(self) -> None:
        check_fields(self, self.ranges)

    def find(self, target: Target, ball: Ball, steps: int, seed: int) -> Found:
        """Looks for inputs that the model takes for another class.

        Args:
            target: The model and its batch, all of whose rows are right before the attack.
            ball: What may be changed.
            steps: The forward and backward passes of a row, at most. An attack of several runs shares them between
                these; each run has one more forward pass, which looks at its last point.
            seed: Of random starts.

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
    return right.squeeze(-1) - others(logits, labels).amax(-1)


def others(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits [B, K], with -inf for the label."""
    return logits.scatter(-1, labels[:, None], -torch.inf)


def generators(x: Tensor, seed: int, run: int = 0) -> list[torch.Generator]:
    """Random numbers for each row of x [B, ...], which depend on the seed, the run and that row's content alone.

    What an attack finds for a row then does not depend on the batch that the row is in.
    """
    found = []
    for row in x.detach().cpu():
        digest = hashlib.blake2b(row.numpy().tobytes() + f"{seed} {run}".encode(), digest_size=4).digest()
        found.append(torch.Generator().manual_seed(int.from_bytes(digest, "little")))
    return found


def shares(steps: int, parts: int) -> list[int]:
    """Steps for each part, which differ by one at most; a part without any is left out."""
    each, more = divmod(steps, parts)
    return [count for i in range(parts) if (count := each + (i < more))]


def in_turn(target: Target, ball: Ball, searches: Iterable[Search], leave: bool = True) -> Found:
    """Several searches, each for the rows that none before has flipped, or for all of them if these do not leave."""
    x = target.center().clone()
    rows = torch.arange(len(x), device=x.device)
    done, passes = torch.zeros(len(x), dtype=torch.bool, device=x.device), 0
    for search in searches:
        if not len(rows):
            break
        found = search(target.rows(rows), ball.rows(rows), rows)
        kept = ~done[rows]
        x[rows[kept]], passes = found.x[kept], passes + found.passes
        done[rows] |= found.done
        rows = (~done).nonzero().flatten() if leave else rows
    return Found(x, done, passes)
