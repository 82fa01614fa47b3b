"""Rationales of texts as a page of HTML: words highlighted by their weights, in a file that needs nothing else.

    rationales = explain(model, tokenizer, texts)
    Path("rationales.html").write_text(rationale_html(rationales), encoding="utf-8")

Weights of tokens become weights of words: a word has the largest weight of the tokens that overlap with it. Texts are
escaped, and the page has no scripts, fonts or pictures. Colors are those of light or dark mode; words above a threshold
are underlined, too, for those who see no difference of colors.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models.contexts import eval_mode
from ..options.ranges import check_count, is_number

WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")
STYLE = """
:root{color-scheme:light dark;--ink:#1b1b1f;--page:#fff;--soft:#5c5c66;--line:#dcdce2;--mark:255,176,0}
@media(prefers-color-scheme:dark){:root{--ink:#ececf0;--page:#17171b;--soft:#a5a5b0;--line:#3a3a42;--mark:150,92,0}}
body{margin:0 auto;max-width:52rem;padding:1.5rem 1rem 3rem;color:var(--ink);background:var(--page);
font:1rem/1.75 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.4rem;line-height:1.3;margin:0 0 .25rem}p{margin:.35rem 0}
article{border-top:1px solid var(--line);padding:1rem 0}
.note,.head{color:var(--soft);font-size:.9rem;line-height:1.5}.head b{color:var(--ink)}
.text{white-space:pre-wrap}
mark{color:inherit;border-radius:.2em;padding:.05em 0;background:rgba(var(--mark),var(--w))}
mark.in{text-decoration:underline;text-underline-offset:.25em;text-decoration-thickness:2px}
.scale mark{padding:.05em .5em;color:var(--ink)}
"""


@dataclass(frozen=True)
class TextRationale:
    """A text, and which of its words a class comes from.

    Args:
        text: The text.
        words: (start, end, weight) of each word; positions in the text, weights from 0 to 1.
        label: The name of the predicted class.
        probability: Its probability.
        truth: The name of the class that it should be, if that is known.
    """

    text: str
    words: tuple[tuple[int, int, float], ...]
    label: str
    probability: float
    truth: str | None = None

    @classmethod
    def of(
        cls, text: str, offsets: Sequence[Sequence[int]], weights: Sequence[float], label: str, probability: float,
        truth: str | None = None,
    ) -> TextRationale:  # fmt: skip
        """From weights of tokens.

        Args:
            text: The text.
            offsets: Start and end of each token in the text [T]; (0, 0) where a token is special.
            weights: The weight of each token [T].
            label: The name of the predicted class.
            probability: Its probability.
            truth: The name of the right class.

        Returns:
            The text with weights of words; words without tokens, such as those that were cut off, have 0.

        Raises:
            ValueError: There are not as many offsets as weights, or a weight is not in [0, 1].
        """
        if len(offsets) != len(weights):
            raise ValueError(f"offsets has {len(offsets)} tokens and weights {len(weights)}: give one weight a token")
        tokens = [(int(s), int(e), float(w)) for (s, e), w in zip(offsets, weights, strict=True) if e > s]
        for *_, weight in tokens:
            if not 0 <= weight <= 1:
                raise ValueError(f"weights has {weight}: scale weights to [0, 1]")
        words, first = [], 0
        for match in WORD.finditer(text):
            start, end = match.span()
            while first < len(tokens) and tokens[first][1] <= start:
                first += 1
            inside = [w for s, e, w in _until(tokens, first, end) if e > start]
            words.append((start, end, max(inside, default=0.0)))
        return cls(text, tuple(words), label, float(probability), truth)


def explain(
    model: Any, tokenizer: Any, texts: Sequence[str], truth: Sequence[str] | None = None, batch_size: int = 32,
    max_length: int | None = None,
) -> list[TextRationale]:  # fmt: skip
    """The rationales of texts by a `Rationale` model, for its predicted classes.

    Args:
        model: The model.
        tokenizer: Its tokenizer, a fast one, which knows where its tokens are in the text.
        texts: The texts.
        truth: The names of the right classes.
        batch_size: How many texts a pass has.
        max_length: Texts are cut to this many tokens; to what the tokenizer says if None.

    Returns:
        One rationale for each text.

    Raises:
        ValueError: The tokenizer is a slow one, or there are not as many classes as texts.
    """
    check_count("batch_size", batch_size, 1)
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer is {type(tokenizer).__name__}, without offsets: load it with use_fast=True")
    if truth is not None and len(truth) != len(texts):
        raise ValueError(f"truth has {len(truth)} classes for {len(texts)} texts: give one for each")
    found = []
    with eval_mode(model), torch.no_grad():
        for start in range(0, len(texts), batch_size):
            part = list(texts[start : start + batch_size])
            inputs = tokenizer(part, padding=True, truncation=True, max_length=max_length, return_tensors="pt",
                               return_offsets_mapping=True)  # fmt: skip
            offsets = inputs.pop("offset_mapping").tolist()
            names = ("input_ids", "attention_mask", "token_type_ids")
            outputs = model(**{name: inputs[name].to(model.device) for name in names if name in inputs})
            best = outputs.logits.float().softmax(-1).max(-1)
            for i, text in enumerate(part):
                label = model.config.id2label[int(best.indices[i])]
                right = None if truth is None else truth[start + i]
                weights = outputs.masks[i].float().tolist()
                found.append(TextRationale.of(text, offsets[i], weights, label, float(best.values[i]), right))
    return found


def rationale_html(rationales: Iterable[TextRationale], title: str = "Rationales", threshold: float = 0.5) -> str:
    """A page with the words of texts highlighted.

    Args:
        rationales: What `explain` returns, or weights of any other kind by `TextRationale.of`.
        title: The title of the page.
        threshold: Words with at least this weight are underlined.

    Returns:
        HTML, complete and without anything that it loads.

    Raises:
        ValueError: A threshold that is not in [0, 1].
    """
    if not is_number(threshold, "[0, 1]"):
        raise ValueError(f"threshold is {threshold}: choose a weight from 0 to 1")
    scale = "".join(f'<mark style="--w:{w}"{_class(w, threshold)}>{w}</mark> ' for w in (0, 0.25, 0.5, 0.75, 1))
    name = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{name}</h1>"
        f'<p class="note">How much of a word the mask keeps, from 0 to 1: <span class="scale">{scale}</span><br>'
        f"Underlined: {threshold} or more. The weight of a word is shown when the pointer is on it.</p>\n"
        + "".join(_article(one, threshold) for one in rationales)
        + "</body></html>\n"
    )


def _article(one: TextRationale, threshold: float) -> str:
    """One text, with its class above."""
    head = f"<b>{html.escape(one.label)}</b> with probability {one.probability:.2f}"
    if one.truth is not None:
        head += ", which is right" if one.truth == one.label else f"; right is <b>{html.escape(one.truth)}</b>"
    parts, at = [], 0
    for start, end, weight in one.words:
        parts.append(html.escape(one.text[at:start]))
        word, at = html.escape(one.text[start:end]), end
        marked = f'<mark style="--w:{weight:.2f}"{_class(weight, threshold)} title="{weight:.2f}">{word}</mark>'
        parts.append(marked if weight >= 0.005 else word)
    parts.append(html.escape(one.text[at:]))
    return f'<article><p class="head">{head}</p><p class="text">{"".join(parts)}</p></article>\n'


def _class(weight: float, threshold: float) -> str:
    return ' class="in"' if weight >= threshold else ""


def _until(tokens: list[tuple[int, int, float]], first: int, end: int) -> Iterable[tuple[int, int, float]]:
    """Tokens from the first one on that start before an end."""
    for token in tokens[first:]:
        if token[0] >= end:
            return
        yield token
