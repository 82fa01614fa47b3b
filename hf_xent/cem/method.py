"""The cross-entropy method: a search that draws candidates, keeps the best, and moves the distribution towards them.

    repeat   draw n candidates from p(.; v);   elites = the best rho n, ties by order
             v_hat = argmin_v H(elites, p(.; v)), the cross-entropy, which is maximum likelihood on the elites
             v <- a v_hat + (1 - a) v
    until    the best is unchanged for some rounds, or all spreads are below a tolerance, or the budget is spent

Source: R. Y. Rubinstein, D. P. Kroese: The Cross-Entropy Method, Springer 2004; taken up for
hyperparameters in arXiv:2410.18441, which reports no measurements.

It finds a minimum, not always the least one: of Rastrigin's function in two dimensions it misses the global minimum
in some of the seeds. Random search, which has no parameters to fit, is the control, under the same interface.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil, inf, isfinite
from typing import Any

import numpy as np

from ..options.ranges import as_number, check_count, check_fields, check_integer
from .families import Array, Frequencies
from .space import Dimension, Space

METHODS = ("cem", "random")
DIRECTIONS = ("minimize", "maximize")


@dataclass(frozen=True)
class Round:
    """What a round has shown.

    Args:
        best: The best score so far; None if none is finite.
        threshold: The score of the last elite; None if the round was not fitted.
        spread: Name -> standard deviation of its coordinate (a logarithm if `log`), or one minus the largest frequency.
    """

    best: float | None
    threshold: float | None
    spread: dict[str, float]


@dataclass
class CrossEntropyMethod:
    """The method as two calls: `ask` for candidates, `tell` their scores.

    A score that is NaN or infinite is that of a failed run: it is worse than every other and never among the elites.
    A round with fewer than two finite scores changes nothing. The draws of a round depend on the seed, the number of
    the round and what was told, so a search that is told the same again continues as it would have.

    Args:
        space: The space, or what `Space.of` makes one from.
        candidates: n, the candidates of a round.
        elites: rho, the share of them that is fitted; at least two are.
        smoothing: a, the weight of the new fit.
        seed: Of the draws.
        direction: "minimize" or "maximize".
        method: "cem", or "random" for the control: every round is drawn as the first one is, and nothing is fitted.
        floor: Standard deviations are kept above this share of the range in early rounds.
        floor_rounds: How many rounds are early.
        patience: Stop when the best has not changed for so many rounds; None for never.
        tolerance: Stop when every spread is below it; 0 for never.

    Raises:
        ValueError: For an option out of its range.
    """

    space: Any
    candidates: int = 20
    elites: float = 0.2
    smoothing: float = 0.7
    seed: int = 0
    direction: str = "minimize"
    method: str = "cem"
    floor: float = 0.05
    floor_rounds: int = 3
    patience: int | None = None
    tolerance: float = 0.0
    best: dict[str, Any] | None = field(default=None, init=False)
    """The best candidate so far, the earlier one of equals."""
    score: float | None = field(default=None, init=False)
    """Its score."""
    history: list[Round] = field(default_factory=list, init=False)
    """What each finished round has shown."""

    def __post_init__(self) -> None:
        self.space = Space.of(self.space)
        check_fields(self, {"elites": "(0, 1]", "smoothing": "(0, 1]", "floor": "[0, 1)", "tolerance": "[0, inf)"})
        for name, least in {"candidates": 2, "seed": 0, "floor_rounds": 0, "patience": 1}.items():
            if getattr(self, name) is not None:
                check_integer(self, name, f"[{least}, inf)")
        for name, choices in {"direction": DIRECTIONS, "method": METHODS}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose {' or '.join(map(repr, choices))}")
        self._parameters = {name: d.family.start() for name, d in self.space.items()}
        self._told: list[tuple[dict[str, float], float]] = []
        self._asked, self._unchanged, self._improved = 0, 0, False

    @property
    def round(self) -> int:
        """Number of finished rounds."""
        return len(self.history)

    @property
    def distribution(self) -> dict[str, Any]:
        """Name -> [mean, standard deviation] of the coordinate, or value -> frequency."""
        return {name: _described(self.space[name], p) for name, p in self._parameters.items()}

    @property
    def stopped(self) -> str | None:
        """Why the search is over, or None."""
        if self.patience is not None and self._unchanged >= self.patience:
            return f"the best is unchanged for {self._unchanged} rounds"
        if self.round and max(self.history[-1].spread.values()) < self.tolerance:
            return f"every spread is below {self.tolerance}"
        return None

    def ask(self, count: int | None = None) -> list[dict[str, Any]]:
        """Candidates of the round.

        Args:
            count: How many; all that the round still has by default.

        Returns:
            Dictionaries of name -> value.

        Raises:
            ValueError: If the round has fewer.
        """
        left = self.candidates - self._asked
        count = left if count is None else count
        check_count("count", count, 0)
        if count > left:
            raise ValueError(f"count is {count}: the round has {left} more candidates, tell their scores first")
        columns = {name: self._drawn(place, name) for place, name in enumerate(self.space)}
        rows = range(self._asked, self._asked + count)
        self._asked += count
        return [{name: self.space[name].value(columns[name][row]) for name in columns} for row in rows]

    def _drawn(self, place: int, name: str) -> Array:
        rng, family = np.random.default_rng([self.seed, self.round, place]), self.space[name].family
        if self.method == "random" or not self.round:
            return family.first(rng, self.candidates)
        return family.draw(self._parameters[name], rng, self.candidates)

    def tell(self, candidates: Sequence[Mapping[str, Any]], scores: Iterable[float]) -> None:
        """Scores of candidates, which need not be those that were asked for. The last of a round fits it.

        Args:
            candidates: Dictionaries of name -> value.
            scores: A number for each.

        Raises:
            ValueError: If there are more of one than of the other, or a candidate is not in the space.
        """
        scores = [as_number("score", score) for score in scores]
        if len(scores) != len(candidates):
            raise ValueError(f"scores has {len(scores)} numbers for {len(candidates)} candidates: give one for each")
        told = [{name: self._coordinate(name, candidate) for name in self.space} for candidate in candidates]
        for candidate, coordinates, score in zip(candidates, told, scores, strict=True):
            self._told.append((coordinates, score))
            if isfinite(score) and (self.score is None or self._cost(score) < self._cost(self.score)):
                self.best, self.score, self._improved = dict(candidate), score, True
            if len(self._told) == self.candidates:
                self._finish()

    def _coordinate(self, name: str, candidate: Mapping[str, Any]) -> float:
        try:
            return self.space[name].coordinate(candidate[name])
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"a candidate has {name}={candidate.get(name)!r}: give a value of the space") from error

    def _cost(self, score: float) -> float:
        return inf if not isfinite(score) else score if self.direction == "minimize" else -score

    def _finish(self) -> None:
        """Fits the round, records it and begins the next."""
        order = sorted(self._told, key=lambda told: self._cost(told[1]))  # equal scores stay in order
        elites = order[: max(2, ceil(self.elites * self.candidates - 1e-9))]
        elites = [told for told in elites if isfinite(told[1])]
        fitted = self.method == "cem" and len(elites) >= 2
        if fitted:
            self._fit([coordinates for coordinates, _ in elites])
        spread = {name: d.family.spread(self._parameters[name]) for name, d in self.space.items()}
        self.history.append(Round(self.score, elites[-1][1] if fitted else None, spread))
        self._unchanged = 0 if self._improved else self._unchanged + 1
        self._told, self._asked, self._improved = [], 0, False

    def _fit(self, elites: list[dict[str, float]]) -> None:
        early = self.round < self.floor_rounds
        for name, dimension in self.space.items():
            family = dimension.family
            new = family.fit([coordinates[name] for coordinates in elites])
            smoothed = self.smoothing * new + (1 - self.smoothing) * self._parameters[name]
            self._parameters[name] = family.floored(smoothed, self.floor) if early else smoothed

    def state_dict(self) -> dict[str, Any]:
        """What was told and fitted, as JSON has it."""
        return {
            "parameters": {name: p.tolist() for name, p in self._parameters.items()},
            "told": self._told,
            "asked": self._asked,
            "unchanged": [self._unchanged, self._improved],
            "best": self.best,
            "score": self.score,
            "history": [asdict(round_) for round_ in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, of a method with the same options.

        Args:
            state: The dictionary, or what JSON made of it.

        Raises:
            ValueError: If it is of another space.
        """
        if list(state["parameters"]) != list(self.space):
            raise ValueError(f"state has the names {', '.join(state['parameters'])}: this space has {[*self.space]}")
        self._parameters = {name: np.array(p, dtype=float) for name, p in state["parameters"].items()}
        self._told = [(dict(coordinates), float(score)) for coordinates, score in state["told"]]
        self._asked, (self._unchanged, self._improved) = state["asked"], state["unchanged"]
        self.best, self.score = state["best"], state["score"]
        self.history = [Round(**round_) for round_ in state["history"]]


def _described(dimension: Dimension, parameters: Array) -> Any:
    if isinstance(dimension.family, Frequencies):
        return {dimension.value(place): float(p) for place, p in enumerate(parameters)}
    return parameters.tolist()
