"""Batches of answers with growing shares of their key phrases removed: the input of SPO's degree loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..data import rake
from ..models.padding import padded


@dataclass
class Variants:
    """A data collator and, beside its tensors, the variants of the rows' answers under `spo`."""

    inner: Callable[[list[dict[str, Any]]], dict[str, Any]]
    tokenizer: Any
    options: Any  # a configuration with the fields of SPOOptions

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch, without `spo` where no answer has a weight."""
        batch = self.inner(rows)
        variants = [variant for row in rows for variant in self._variants(row)]
        if not variants:
            return batch
        tokens, starts, *columns = zip(*variants, strict=True)
        ids, mask = padded(tokens)
        answer = mask.bool() & (torch.arange(ids.shape[1]) >= torch.tensor(starts)[:, None])
        degree, side, weight = map(torch.tensor, columns)
        task = {"input_ids": ids, "attention_mask": mask, "answer": answer, "degree": degree, "side": side}
        return {**batch, "spo": {**task, "weight": weight / (len(rows) * self.options.degrees)}}

    def _variants(self, row: dict[str, Any]) -> Iterator[tuple[list[int], int, int, int, float]]:
        """(tokens, where the answer begins, degree, side, gamma) of every variant of a row's weighted answers."""
        if "completion" in row:
            answers = [(row["completion"], 0 if row.get("label", True) else 1)]
        else:
            answers = [(row["chosen"], 0), (row["rejected"], 1)]
        for answer, side in answers:
            gamma = (self.options.gamma_w, self.options.gamma_l)[side]
            if gamma and _has_text(answer):
                for degree, (tokens, start) in enumerate(self._tokens(row, answer)):
                    yield tokens, start, degree, side, float(gamma)

    def _tokens(self, row: dict[str, Any], answer: Any) -> Iterator[tuple[list[int], int]]:
        limit, prompt, template = getattr(self.options, "max_length", None), row["prompt"], _template(row)
        empty: Any = [] if isinstance(prompt, list) else ""
        before = self._ids(prompt, empty, add_generation_prompt=True, **template)
        for variant in self._cut(answer):
            tokens = self._ids(prompt, variant, **template)[:limit]
            yield tokens, min(_common_prefix_length(before, tokens), len(tokens) - 1)

    def _ids(self, prompt: Any, answer: Any, **template: Any) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt + answer)["input_ids"]
        text = self.tokenizer.apply_chat_template(prompt + answer, tokenize=False, **template)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _cut(self, answer: Any) -> list[Any]:
        """The answer with growing shares of its key phrases removed; in a conversation, of the text of each message."""
        if isinstance(answer, str):
            end = self.tokenizer.eos_token or ""  # TRL has added it; it is not key content
            body = answer.removesuffix(end)
            shuffled = self.options.key_content == "random"
            texts = rake.without(body, self.options.shares, shuffled=shuffled)
            return [text + answer[len(body) :] for text in texts]
        if not isinstance(answer, list):  # None where a message calls tools
            return [answer] * self.options.degrees
        variants = []
        for item in answer:  # messages, or parts of the content of one
            key = "content" if "content" in item else "text"
            variants.append([{**item, key: text} if key in item else item for text in self._cut(item.get(key))])
        return [list(items) for items in zip(*variants, strict=True)]


def _has_text(answer: Any) -> bool:
    """Whether there is anything to cut in an answer, its messages, or their parts."""
    if isinstance(answer, list):
        return any(_has_text(item.get("content", item.get("text"))) for item in answer)
    return isinstance(answer, str) and bool(answer.strip())


def _template(row: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a row has for its chat template, read as TRL reads them."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {**({"tools": tools} if tools else {}), **(row.get("chat_template_kwargs") or {})}


def _common_prefix_length(one: list[int], other: list[int]) -> int:
    """How many elements two lists share from their beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
