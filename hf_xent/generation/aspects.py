"""What a language model answers to yes/no questions about texts: the probability of yes, for every row and question.

    P(yes | row, question) = softmax(z_yes, z_no)_yes = sigma(z_yes - z_no)

z are the logits of the two answers' tokens after a prompt that shows the row and asks the question: two rows of the
head at one position, no other logits. The prompts of one row begin with the same tokens, those of its text, which run
through the model once; their keys and values are shared by all questions, whose own tokens follow as continuations.

    questions = ["Is the text fiction?", "Does the text report an event of the day?"]
    train = train.add_column("aspects", aspects(model, train, questions, tokenizer=tokenizer).tolist())

Source: Lee et al. 2025, Multi-aspect Knowledge Distillation with Large Language Model, arXiv:2501.13341, where a
multimodal model answers questions about images; `hf_xent.classes.Aspects` trains a classifier on the answers. The
sharing of the row's tokens is ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from ..data import Format
from ..models.anatomy import positions
from ..models.contexts import eval_mode
from ..models.fingerprints import fingerprint_model
from ..models.padding import padded
from ..options.ranges import check_count
from ..patching import inner_of, patched
from .judging import Row, odds, verdict_tokens
from .prefixes import cache_name, can_be_continued, kept, selected

QUESTION = Format("Text: {text}\n\nAnswer a question about the text by Yes or No alone. {question}", ("Yes", "No"))
"""The default prompt; another one may use any field of a row. Its part before `{question}` is computed once a row."""

Pair = tuple[int, int]  # a row and a question


def aspects(
    model: Any,
    rows: Iterable[Row | str],
    questions: Sequence[str],
    *,
    tokenizer: Any,
    format: Format = QUESTION,
    batch_size: int = 32,
    cache: str | Path | None = None,
) -> Tensor:
    """The probability that a language model answers yes, for every row and question.

    The model is patched for the occasion (`hf_xent.patch`), without gradients and in evaluation mode. An answer does
    not depend on the other rows and questions.

    Args:
        model: A causal LM.
        rows: n rows with the fields of the format, or texts, which are the field `text`.
        questions: Q questions, each of which can be answered by yes or no.
        tokenizer: The model's tokenizer; its chat template is applied, if it has one.
        format: The prompt, with the field `question`, and the answers that stand for yes and for no.
        batch_size: Number of prompts in a forward pass.
        cache: A file that keeps the answers (JSON lines), by model and prompt: what it has is not computed again, so a
            call that was interrupted goes on. None keeps nothing.

    Returns:
        The probabilities [n, Q], float32, on the CPU.

    Raises:
        ValueError: No questions or a text instead of a list of them, a format without `{question}`, answers that are
            not two different single tokens, a prompt that is longer than the model has positions, an encoder and a
            decoder, or batch_size below 1.
    """
    check_count("batch_size", batch_size, 1)
    if isinstance(questions, str) or not questions:
        raise ValueError(f"questions is {questions!r}: pass a list of at least one question")
    if "{question}" not in format.template:
        raise ValueError(f"format has the template {format.template!r}: write {{question}} where the question stands")
    inner: Any = inner_of(model)
    if getattr(inner.config, "is_encoder_decoder", False):
        raise ValueError(f"model is a {type(inner).__name__}, an encoder and a decoder: pass a causal LM")
    fields = [{"text": row} if isinstance(row, str) else row for row in rows]
    if not fields:
        return torch.empty(0, len(questions))
    encoded = [[format.encode({**row, "question": q}, tokenizer) for q in questions] for row in fields]
    verdicts = verdict_tokens(format, [answers for row in encoded for _, answers in row])
    prompts = [[prompt for prompt, _ in row] for row in encoded]
    longest, room = max(len(prompt) for row in prompts for prompt in row), positions(model)
    if room is not None and longest > room:
        raise ValueError(f"a prompt has {longest} tokens, but the model has {room} positions: shorten the row's text")
    stored = Answers(cache, model, verdicts)
    todo: dict[int, list[int]] = {}  # row -> its questions that are not answered yet
    for i, row in enumerate(prompts):
        if missing := [j for j, prompt in enumerate(row) if stored.get(prompt) is None]:
            todo[i] = missing
    with tqdm(total=sum(map(len, todo.values())), desc="Asking", leave=False, disable=None) as progress:
        for pairs, p in _answered(model, prompts, todo, verdicts, batch_size):
            stored.add([(prompts[i][j], x) for (i, j), x in zip(pairs, p.float().tolist(), strict=True)])
            progress.update(len(pairs))
    return torch.tensor([[stored.get(prompt) for prompt in row] for row in prompts], dtype=torch.float32)


class Answers:
    """The answers of a model by prompt, in memory and, if there is one, in a file that grows with every batch.

    Args:
        path: The file, or None.
        model: The model; answers of other models in the file are left alone.
        verdicts: The tokens of yes and no.
    """

    def __init__(self, path: str | Path | None, model: Any, verdicts: list[int]):
        self.path = None if path is None else Path(path)
        self.asked = json.dumps([fingerprint_model(model) if path is not None else None, verdicts])
        self.known: dict[str, float] = {}
        if self.path is not None and self.path.exists():
            text = self.path.read_text()
            # a line that a killed process did not finish has no end
            self.known = dict(json.loads(line) for line in text.splitlines() if line.endswith("]"))
            if text and not text.endswith("\n"):
                with self.path.open("a") as file:
                    file.write("\n")

    def _key(self, prompt: list[int]) -> str:
        return hashlib.sha256(f"{self.asked}{prompt}".encode()).hexdigest()[:32]

    def get(self, prompt: list[int]) -> float | None:
        """The probability of yes after a prompt's tokens; None if it is not known."""
        return self.known.get(self._key(prompt))

    def add(self, answers: list[tuple[list[int], float]]) -> None:
        """Keeps the probabilities of yes after some prompts."""
        new = [(self._key(prompt), p) for prompt, p in answers]
        self.known.update(new)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.writelines(json.dumps(item) + "\n" for item in new)


def _answered(
    model: Any, prompts: list[list[list[int]]], todo: dict[int, list[int]], verdicts: list[int], batch_size: int
) -> Iterator[tuple[list[Pair], Tensor]]:
    """Batches of at most batch_size pairs and their probabilities of yes, rows of similar lengths together."""
    shared = {i: _shared(prompts[i]) for i in todo}
    order = sorted(todo, key=shared.__getitem__)
    rows_at_once = max(1, batch_size // max(map(len, todo.values()), default=1))
    for start in range(0, len(order), rows_at_once):
        rows = order[start : start + rows_at_once]
        length = shared[rows[0]]  # of the shortest one: what the others have beyond it is left to their continuations
        with torch.no_grad(), eval_mode(model), patched(model, always=True):
            past = _past(model, [prompts[i][0][:length] for i in rows])
            length = 0 if past is None else length
            pairs = [(i, j) for i in rows for j in todo[i]]
            for first in range(0, len(pairs), batch_size):
                part = pairs[first : first + batch_size]
                continuations = [prompts[i][j][length:] for i, j in part]
                places = [rows.index(i) for i, _ in part]
                yield part, _odds(model, continuations, verdicts, past, places)


def _shared(prompts: list[list[int]]) -> int:
    """The number of tokens that all prompts begin with; each has at least one of its own after them."""
    first, most = prompts[0], min(map(len, prompts)) - 1
    return next((k for k in range(most) if any(prompt[k] != first[k] for prompt in prompts)), most)


def _past(model: Any, beginnings: list[list[int]]) -> Any:
    """Keys and values of n beginnings of equal length; None if there are none, or the model keeps other states, too.

    The states of recurrent layers cannot be continued by padded rows, nor can those of all kinds be selected by row.
    """
    if not beginnings[0] or not can_be_continued(model):
        return None
    return kept(model, model(input_ids=torch.tensor(beginnings, device=model.device), use_cache=True))


def _odds(model: Any, rows: list[list[int]], verdicts: list[int], past: Any, places: list[int]) -> Tensor:
    """The probability of yes [n] after n continuations; `places` [n] tells which entry of `past` each one follows."""
    ids, mask = padded(rows, device=model.device)
    last = mask.sum(1) - 1
    if past is None:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    else:
        past = selected(past, torch.tensor(places, device=ids.device))
        # no mask: padding is on the right, which no earlier token attends to, and some models take no longer masks
        logits = model(input_ids=ids, use_cache=True, **{cache_name(model): past}).logits
    return odds(logits, last, verdicts)
