"""A language model as several raters: ordered verdicts about texts, on criteria, each asked in several formats.

    p_k = softmax(z_1, ..., z_K)_k        z: the logits of a format's K verdict tokens after its prompt
    e   = sum_k k p_k / (K - 1)           the expected verdict, from 0 to 1

A format of a prompt has a severity of its own, as a human rater has, and some formats are noise. So each is a rater of
a many-facet Rasch model (`hf_xent.rasch`), whose measure of a text is free of which formats judged it, and whose fit
statistics tell which formats do not go with the rest:

    found = label(model, texts, criteria, formats, tokenizer=tokenizer)
    measure = rasch.fit(found.cells(levels=4), unit="unit", item="criterion", rater="format")

Source: Kennedy et al. 2020, arXiv:2009.10277, for ordered items of human raters as one measure. Formats of prompts as
raters, and their expected verdicts as categories, are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..data import Format
from ..options.ranges import check_count
from .answering import answer_tokens, ask
from .judging import Row


@dataclass(frozen=True)
class Labels:
    """The verdicts of a model on n texts, by C criteria, in F formats."""

    probabilities: Tensor  # [n, C, F, K], float32
    criteria: tuple[str, ...]
    formats: tuple[str, ...]

    def expected(self) -> np.ndarray:
        """The expected verdicts [n, C, F], from 0 (all probability is on the lowest) to 1."""
        p = self.probabilities.double().numpy()
        return p @ np.arange(p.shape[-1]) / (p.shape[-1] - 1)

    def categories(self, levels: int | None = None) -> np.ndarray:
        """Ordered categories [n, C, F].

        Args:
            levels: The expected verdicts of all formats are cut together, at their quantiles, into this many
                categories of about equal size, from 0: a format that likes high verdicts has high categories. None for
                the likeliest verdict, from 0 to K - 1, which a small model may not vary.

        Raises:
            ValueError: levels is below 2.
        """
        if levels is None:
            return self.probabilities.argmax(-1).numpy()
        check_count("levels", levels, 2)
        verdicts = self.expected()
        cuts = np.quantile(verdicts, np.arange(1, levels) / levels)
        return np.searchsorted(cuts, verdicts, side="right")

    def cells(self, levels: int | None = None) -> dict[str, list[Any]]:
        """One category a row, for `hf_xent.rasch.fit`: columns unit (the text's place), criterion, format and score."""
        scores = self.categories(levels)
        unit, criterion, form = (index.ravel() for index in np.indices(scores.shape))
        return {
            "unit": unit.tolist(),
            "criterion": [self.criteria[i] for i in criterion],
            "format": [self.formats[i] for i in form],
            "score": scores.ravel().tolist(),
        }


def label(
    model: Any,
    rows: Iterable[Row | str],
    criteria: Mapping[str, str],
    formats: Mapping[str, Format],
    *,
    tokenizer: Any,
    batch_size: int = 32,
    cache: str | Path | None = None,
) -> Labels:
    """The probabilities of ordered verdicts, for every text, criterion and format.

    What the prompts of a text begin with runs through the model once: put the text first. A verdict does not depend on
    the other texts, criteria and formats.

    Args:
        model: A causal LM.
        rows: n rows with the fields of the formats, or texts, which are the field `text`.
        criteria: Name -> what is judged, which stands at `{criterion}` in a format.
        formats: Name -> prompt and its verdicts, from the lowest to the highest, whatever order the prompt names them
            in. All have the same number K of verdicts.
        tokenizer: The model's tokenizer; its chat template is applied, if it has one.
        batch_size: Number of prompts in a forward pass.
        cache: A file that keeps the verdicts (JSON lines), by model and prompt, so that a call that was interrupted
            goes on. None keeps nothing.

    Returns:
        The verdicts.

    Raises:
        ValueError: No rows, criteria or formats; formats with different numbers of verdicts, or without `{criterion}`;
            verdicts that are not different single tokens; a prompt that is longer than the model has positions; an
            encoder and a decoder; or batch_size below 1.
    """
    check_count("batch_size", batch_size, 1)
    _check(criteria, formats)
    fields = [{"text": row} if isinstance(row, str) else row for row in rows]
    if not fields:
        raise ValueError("rows is empty: pass at least one text")
    encoded = [
        [
            format.encode({**row, "criterion": what}, tokenizer)
            for what in criteria.values()
            for format in formats.values()
        ]
        for row in fields
    ]
    tokens = []
    for form, format in enumerate(formats.values()):
        asked = [answers for row in encoded for _, answers in row[form :: len(formats)]]
        tokens.append(answer_tokens(format, asked))
    prompts = [[prompt for prompt, _ in row] for row in encoded]
    found = ask(
        model, prompts, tokens * len(criteria), lambda z: z.float().softmax(-1), batch_size=batch_size, cache=cache
    )
    shape = (len(fields), len(criteria), len(formats), found.shape[-1])
    return Labels(found.reshape(shape), tuple(criteria), tuple(formats))


def _check(criteria: Mapping[str, str], formats: Mapping[str, Format]) -> None:
    """Raises: ValueError for no criteria or formats, or formats that do not go together."""
    for name, given in (("criteria", criteria), ("formats", formats)):
        if not isinstance(given, Mapping) or not given:
            raise ValueError(f"{name} is {given!r}: pass a dictionary of at least one, by name")
    counts: Sequence[int] = sorted({len(format.answers) for format in formats.values()})
    if len(counts) > 1 or counts[0] < 2:
        raise ValueError(f"formats have {counts} verdicts: give all the same number, at least two")
    for name, format in formats.items():
        if "{criterion}" not in format.template:
            raise ValueError(f"the format {name!r} has no {{criterion}}: write it where the criterion stands")
