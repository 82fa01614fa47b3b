"""The minimum of a function that is cheap enough to be called often; `hf_xent.cem.searching` is for training runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..options.ranges import check_count
from .method import CrossEntropyMethod, Round


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Args:
        best: Name -> value of the best candidate.
        score: Its score.
        evaluations: How many candidates were scored.
        stopped: Why it ended.
        history: What each round has shown.
    """

    best: dict[str, Any]
    score: float
    evaluations: int
    stopped: str
    history: list[Round]


def minimize(
    function: Callable[[dict[str, Any]], float],
    space: Any,
    candidates: int = 100,
    elites: float = 0.1,
    rounds: int = 20,
    budget: int | None = None,
    **options: Any,
) -> Found:
    """The minimum of a function, or with `direction="maximize"` its maximum, by the cross-entropy method.

    Args:
        function: From a dictionary of name -> value to a score. One that raises ends the search: catch what may fail,
            and return nan for it.
        space: The space, or what `Space.of` makes one from.
        candidates: n, the candidates of a round.
        elites: rho, the share of them that is fitted.
        rounds: How many rounds.
        budget: How often the function is called at most; the last round may then be incomplete.
        **options: `smoothing`, `seed`, `direction`, `method`, `floor`, `patience` ... of `CrossEntropyMethod`.

    Returns:
        The best candidate, its score, and what each round has shown.

    Raises:
        ValueError: For an option out of its range, or if no score is finite.
    """
    search = CrossEntropyMethod(space, candidates, elites, **options)
    check_count("rounds", rounds, 1)
    budget = rounds * search.candidates if budget is None else min(budget, rounds * search.candidates)
    check_count("budget", budget, 1)
    evaluations = 0
    while evaluations < budget and not search.stopped:
        batch = search.ask(min(search.candidates, budget - evaluations))
        search.tell(batch, [function(candidate) for candidate in batch])
        evaluations += len(batch)
    if search.best is None or search.score is None:
        raise ValueError(f"function returned no finite number for any of {evaluations} candidates")
    return Found(search.best, search.score, evaluations, search.stopped or "the budget is spent", search.history)
