"""Sweeps: the configs of several shapes and dtypes, from comma-separated lists."""

from __future__ import annotations

from itertools import product
from typing import Any

from .config import SHAPED, BenchConfig, shaped


def sweep(tokens: str, vocab: str | None, dtype: str, **same: Any) -> list[BenchConfig]:
    """Configs of all combinations of comma-separated lists; all are checked before the first one runs.

    Args:
        tokens: Numbers of tokens, as in '512,1024'.
        vocab: Vocabularies of 'calibrated' or 'random' inputs; None for the default one.
        dtype: Names of dtypes.
        same: The other options of `BenchConfig`, which all configs share.

    Returns:
        The configs, by dtype, then by vocabulary, then by tokens.

    Raises:
        ValueError: If `tokens` or `vocab` is not a list of whole numbers, or `vocab` is given for a real model.
    """
    model = same.get("model", BenchConfig.model)
    if vocab is not None and not shaped(model):
        raise ValueError(
            f"vocab is {vocab!r}, but {model} has its own: leave it out, or choose model {' or '.join(SHAPED)}"
        )
    lists: dict[str, list[Any]] = {
        "dtype": _words(dtype),
        "vocab": [BenchConfig.vocab] if vocab is None else _integers("vocab", vocab),
        "tokens": _integers("tokens", tokens),
    }
    return [BenchConfig(**same, **dict(zip(lists, point, strict=True))) for point in product(*lists.values())]


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",")))


def _integers(name: str, text: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise ValueError(f"{name} is {text!r}: give whole numbers, with commas between them") from None
