"""Which of K answers, one token each, a language model gives to questions about texts: their logits after each prompt.

    z [n, K]     rows of the head at the last position of a prompt, no other logits

The prompts of one row of a table, which are questions about it, may begin with the same tokens, those of its text: they
run through the model once, and their keys and values are shared by all questions, whose own tokens follow as
continuations. Answers are kept by prompt, in a file if there is one, so that a call that was interrupted goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from ..data import Format
from ..lazy import LazyLogits
from ..models.anatomy import positions
from ..models.contexts import eval_mode
from ..models.fingerprints import fingerprint_model
from ..models.padding import padded
from ..patching import inner_of, patched
from .prefixes import cache_name, can_be_continued, kept, selected

Pair = tuple[int, int]  # a row and a question


def answer_tokens(format: Format, answers: Sequence[list[list[int]]]) -> list[int]:
    """The tokens of a format's answers, which have to be the same after every prompt.

    Args:
        format: The format, for the message.
        answers: The tokens of all answers after each prompt, as `Format.encode` returns them.

    Raises:
        ValueError: The answers are not different single tokens.
    """
    count = len(format.answers)
    distinct = {tuple(token for answer in each for token in answer) for each in answers}
    [tokens, *others] = distinct
    if others or len(tokens) != count or len(set(tokens)) != count or any(len(a) != 1 for a in answers[0]):
        raise ValueError(
            f"the verdicts {format.answers} have the tokens {sorted(distinct)}: choose {'two' if count == 2 else count}"
            " different ones that are always one token each"
        )
    return list(tokens)


def answer_logits(logits: LazyLogits | Tensor, last: Tensor, tokens: Sequence[int]) -> Tensor:
    """The logits [n, K] of some tokens at one position of each row, from their rows of the head.

    Args:
        logits: The logits [n, T, V] of a patched model.
        last: The position [n] of each row.
        tokens: The ids [K].
    """
    at = logits[torch.arange(len(last), device=last.device), last]
    if isinstance(at, LazyLogits):
        return at.with_head(lambda h, head: head[torch.tensor(tokens, device=h.device)].logits(h))
    return at[:, list(tokens)]  # the logits are computed already: take those of one position


class Answers:
    """The answers of a model by prompt, in memory and, if there is one, in a file that grows with every batch.

    Args:
        path: The file, or None.
        model: The model; answers of other models in the file are left alone.
    """

    def __init__(self, path: str | Path | None, model: Any):
        self.path = None if path is None else Path(path)
        self.model = fingerprint_model(model) if path is not None else None
        self.known: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            text = self.path.read_text()
            self.known = dict(filter(None, map(_whole, text.splitlines())))
            if text and not text.endswith("\n"):
                with self.path.open("a") as file:
                    file.write("\n")

    def _key(self, prompt: list[int], tokens: list[int]) -> str:
        return hashlib.sha256(f"{json.dumps([self.model, tokens])}{prompt}".encode()).hexdigest()[:32]

    def get(self, prompt: list[int], tokens: list[int]) -> Any:
        """What is known of the answers `tokens` after a prompt; None if nothing is."""
        return self.known.get(self._key(prompt, tokens))

    def add(self, answers: list[tuple[list[int], list[int], Any]]) -> None:
        """Keeps what was found, a number or a list of them, for some prompts and their answers' tokens."""
        new = [(self._key(prompt, tokens), value) for prompt, tokens, value in answers]
        self.known.update(new)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.writelines(json.dumps(item) + "\n" for item in new)


def _whole(line: str) -> list[Any] | None:
    """The item of a line, or None for one that a killed process did not finish."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def ask(
    model: Any,
    prompts: Sequence[Sequence[list[int]]],
    tokens: Sequence[list[int]],
    read: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    cache: str | Path | None,
) -> Tensor:
    """What a model answers to every question about every row.

    The model is patched for the occasion, without gradients and in evaluation mode.

    Args:
        model: A causal LM.
        prompts: n rows of Q prompts, as ids; n is at least 1.
        tokens: The K tokens [Q, K] of each question's answers.
        read: What is kept of the logits [b, K] of some answers, [b] or [b, ...], float.
        batch_size: Number of prompts in a forward pass.
        cache: The file of the answers that are known; None keeps nothing.

    Returns:
        [n, Q] or [n, Q, ...], float32, on the CPU.

    Raises:
        ValueError: The model has an encoder and a decoder, or a prompt has more tokens than the model has positions.
    """
    inner: Any = inner_of(model)
    if getattr(inner.config, "is_encoder_decoder", False):
        raise ValueError(f"model is a {type(inner).__name__}, an encoder and a decoder: pass a causal LM")
    longest, room = max(len(prompt) for row in prompts for prompt in row), positions(model)
    if room is not None and longest > room:
        raise ValueError(f"a prompt has {longest} tokens, but the model has {room} positions: shorten the row's text")
    stored = Answers(cache, model)
    todo: dict[int, list[int]] = {}  # row -> its questions that are not answered yet
    for i, row in enumerate(prompts):
        if missing := [j for j, prompt in enumerate(row) if stored.get(prompt, tokens[j]) is None]:
            todo[i] = missing
    with tqdm(total=sum(map(len, todo.values())), desc="Asking", leave=False, disable=None) as progress:
        for pairs, z in _answered(model, prompts, todo, tokens, batch_size):
            values = read(z).float().tolist()
            stored.add([(prompts[i][j], tokens[j], x) for (i, j), x in zip(pairs, values, strict=True)])
            progress.update(len(pairs))
    found = [[stored.get(prompt, tokens[j]) for j, prompt in enumerate(row)] for row in prompts]
    return torch.tensor(found, dtype=torch.float32)


def _answered(
    model: Any,
    prompts: Sequence[Sequence[list[int]]],
    todo: dict[int, list[int]],
    tokens: Sequence[list[int]],
    batch_size: int,
) -> Iterator[tuple[list[Pair], Tensor]]:
    """Batches of at most batch_size pairs and their answers' logits [b, K], rows of similar lengths together."""
    shared = {i: _shared(prompts[i]) for i in todo}
    order = sorted(todo, key=shared.__getitem__)
    rows_at_once = max(1, batch_size // max(map(len, todo.values()), default=1))
    columns = sorted({token for each in tokens for token in each})
    place = torch.tensor([[columns.index(token) for token in each] for each in tokens])  # [Q, K]
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
                z = _logits(model, continuations, columns, past, [rows.index(i) for i, _ in part])
                yield part, z.gather(1, place[[j for _, j in part]].to(z.device))


def _shared(prompts: Sequence[list[int]]) -> int:
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


def _logits(model: Any, rows: list[list[int]], columns: list[int], past: Any, places: list[int]) -> Tensor:
    """The logits [n, columns] after n continuations; `places` [n] tells which entry of `past` each one follows."""
    ids, mask = padded(rows, device=model.device)
    last = mask.sum(1) - 1
    if past is None:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    else:
        past = selected(past, torch.tensor(places, device=ids.device))
        # no mask: padding is on the right, which no earlier token attends to, and some models take no longer masks
        logits = model(input_ids=ids, use_cache=True, **{cache_name(model): past}).logits
    return answer_logits(logits, last, columns)
