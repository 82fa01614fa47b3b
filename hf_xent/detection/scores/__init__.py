"""Scores of texts from the statistics of their tokens: one file per score or family, and one line each in `SCORES`.

For the scored tokens i = 1..n of a text, logp_i = log p(x_i | x_<i), H_i the entropy and s_i^2 the variance of log p
under p. `hf_xent.detection.SCORES.table()` lists every score's formula and source; `min_k_percent.py` is an example for
a new one. A file must not have the name of a score: `scores.min_k` is the function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...registry import Registry

if TYPE_CHECKING:  # loaded on first access to a score: help texts that list the names need no torch
    from .base import Score as Score

SCORES: Registry[Score] = Registry(
    "score",
    {
        "loss": "likelihood:loss",
        "perplexity": "likelihood:perplexity",
        "zlib": "compression:zlib",
        "lowercase": "lowercasing:lowercase",
        "reference": "calibration:reference",
        "reference_gap": "calibration:reference_gap",
        "min_k": "min_k_percent:min_k",
        "min_k_pp": "min_k_percent:min_k_pp",
        "dc_pdd": "divergence:dc_pdd",
        "fast_detect": "curvature:fast_detect",
        "fast_detect_pair": "curvature:fast_detect_pair",
        "binoculars": "cross_perplexity:binoculars",
    },
    package=__name__,
)
"""Name -> score."""

SECOND_MODEL = ("reference", "cross_payload", "cross_moments")
"""The inputs of a score that take a second model."""


def get(score: str) -> Score:
    """A registered score by name, with options if any.

    Args:
        score: 'loss', 'min_k:k=0.1', 'dc_pdd:a=0.1'.

    Returns:
        The score, which is called with the statistics of texts and the inputs that it `needs`.

    Raises:
        ValueError: For an unknown name, an option that the score does not have, or a value outside of its range.
    """
    SCORES.find(score.partition(":")[0])  # for an unknown name, `build` would advise to pass an object
    try:
        return SCORES.build(score)
    except ValueError as error:
        raise error.__cause__ or error  # noqa: B904  the message of an option's range is shown as it is


def sweep(name: str, **values: Sequence[Any]) -> list[str]:
    """The names of one score with each value of an option; `TextScorer` needs one forward pass for all of them.

        sweep("dc_pdd", a=(0.01, 0.1))          ['dc_pdd:a=0.01', 'dc_pdd:a=0.1']

    Args:
        name: A name in `SCORES`.
        **values: One option, and its values.

    Returns:
        Names with options, as for `TextScorer`.

    Raises:
        ValueError: For no option, or more than one.
    """
    if len(values) != 1:
        raise ValueError(f"sweep of {name!r} is over {', '.join(values) or 'nothing'}: name one option")
    [(option, choices)] = values.items()
    return [f"{name}:{option}={choice}" for choice in choices]


def __getattr__(name: str) -> Any:
    if name in SCORES.exported:
        return SCORES[SCORES.exported[name]].of
    return SCORES.attribute(name, {"Score": "base"})
