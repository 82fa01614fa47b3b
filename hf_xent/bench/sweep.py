"""Sweeps: the configs of several shapes, dtypes and objectives, from comma-separated lists."""

from __future__ import annotations

from itertools import product
from typing import Any

from ..options.ranges import whole_numbers
from .config import SHAPED, BenchConfig, shaped
from .objectives import OBJECTIVES, PLAIN

EVERY = "all"


def sweep(
    tokens: str | None,
    vocab: str | None,
    dtype: str,
    *,
    width: int | None = None,
    shapes: str | None = None,
    objectives: str = PLAIN,
    **same: Any,
) -> list[BenchConfig]:
    """Configs of all combinations of comma-separated lists; all are checked before the first one runs.

    Args:
        tokens: Numbers of tokens, as in '512,1024'; None for the default one.
        vocab: Vocabularies of 'calibrated' or 'random' inputs; None for the default one.
        dtype: Names of dtypes.
        width: The hidden size of 'calibrated' or 'random' inputs; None for the default one.
        shapes: Tokens, vocabulary and width of such inputs, as in '8192x256000x2304,16384x248320x2048', in place of
            the three.
        objectives: Names of objectives, or 'all'.
        same: The other options of `BenchConfig`, which all configs share.

    Returns:
        The configs, by dtype, then by vocabulary and tokens, or in the order of `shapes`, then by objective.

    Raises:
        ValueError: If a list holds something else, `vocab` or `shapes` is given for a real model, or `shapes` beside
            what it replaces.
    """
    model = same.get("model", BenchConfig.model)
    for name, value in (("vocab", vocab), ("shapes", shapes)):
        if value is not None and not shaped(model):
            raise ValueError(
                f"{name} is {value!r}, but {model} has its own: leave it out, or choose model {' or '.join(SHAPED)}"
            )
    if shapes is None:
        sizes = [
            (N, V, BenchConfig.width if width is None else width)
            for V in ([BenchConfig.vocab] if vocab is None else _integers("vocab", vocab))
            for N in ([BenchConfig.tokens] if tokens is None else _integers("tokens", tokens))
        ]
    elif (tokens, vocab, width) == (None, None, None):
        sizes = [_shape(word, shapes) for word in _words(shapes)]
    else:
        raise ValueError(f"shapes is {shapes!r}, but tokens, vocab or width is given, too: give one or the other")
    names = list(OBJECTIVES) if objectives == EVERY else _words(objectives)
    return [
        BenchConfig(**same, dtype=kind, tokens=N, vocab=V, width=D, objective=objective)
        for kind, (N, V, D), objective in product(_words(dtype), sizes, names)
    ]


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",")))


def _integers(name: str, text: str) -> list[int]:
    return list(dict.fromkeys(whole_numbers(name, text)))


def _shape(word: str, text: str) -> tuple[int, int, int]:
    try:
        N, V, D = map(int, word.split("x"))
    except ValueError:
        raise ValueError(
            f"shapes is {text!r}: give tokens x vocabulary x width, as in 8192x256000x2304, with commas between shapes"
        ) from None
    return N, V, D
