"""Several teachers at once: the loss is the weighted sum of the losses against each of them.

    loss = sum_i w_i D(teacher_i, student)        sum_i w_i = 1

Under forward KL that is distillation of their mixture m = sum_i w_i p_i, up to a constant: sum_i w_i KL(p_i || q) =
KL(m || q) + sum_i w_i KL(p_i || m), and the last term does not depend on the student q. Other divergences have no
such identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..losses.targets import Several
from .base import Teacher


class SeveralTeachers:
    """Teachers of any kinds, with weights.

    Args:
        teachers: The teachers.
        weights: One number >= 0 for each, not all of them 0; they are divided by their sum. None weighs all alike.

    Raises:
        ValueError: There is no teacher, or the weights do not fit.
    """

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float] | None = None):
        self.teachers = tuple(teachers)
        given = [1.0] * len(self.teachers) if weights is None else [float(w) for w in weights]
        if not self.teachers or len(given) != len(self.teachers):
            raise ValueError(
                f"{len(given)} weights are given for {len(self.teachers)} teachers: pass teachers, and one weight each"
            )
        if not all(0 <= w < float("inf") for w in given) or not sum(given):
            raise ValueError(f"weights are {given}: choose finite numbers >= 0, and one of them above 0")
        self.weights = tuple(w / sum(given) for w in given)

    @property
    def name(self) -> str:
        """The names of all, with their weights."""
        named = [getattr(teacher, "name", type(teacher).__name__) for teacher in self.teachers]
        return " + ".join(f"{weight:g} {name}" for weight, name in zip(self.weights, named, strict=True))

    def targets(self, batch: Mapping[str, Any]) -> Several:
        """What each of them says about the batch."""
        return Several(tuple(teacher.targets(batch) for teacher in self.teachers), self.weights)
