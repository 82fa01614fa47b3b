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

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Format
from ..options.ranges import check_count
from .answering import answer_tokens, ask
from .judging import Row

QUESTION = Format("Text: {text}\n\nAnswer a question about the text by Yes or No alone. {question}", ("Yes", "No"))
"""The default prompt; another one may use any field of a row. Its part before `{question}` is computed once a row."""


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
    fields = [{"text": row} if isinstance(row, str) else row for row in rows]
    if not fields:
        return torch.empty(0, len(questions))
    encoded = [[format.encode({**row, "question": q}, tokenizer) for q in questions] for row in fields]
    verdicts = answer_tokens(format, [answers for row in encoded for _, answers in row])
    prompts = [[prompt for prompt, _ in row] for row in encoded]
    tokens = [verdicts] * len(questions)
    return ask(model, prompts, tokens, lambda z: (z[:, 0] - z[:, 1]).sigmoid(), batch_size=batch_size, cache=cache)
