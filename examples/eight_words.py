"""A task that a program can check: "What is rain? Answer in at most eight words.", for models that answer and judge.

An answer is right if it has three to eight words and names the thing. `program` is a judge that checks this, and
`chance` one whose probabilities are random; osp_rounds.py trains with both.
"""

from __future__ import annotations

import random
from statistics import mean
from typing import Any

from datasets import Dataset

from hf_xent.generation import judging, sampling

THINGS = (
    "rain bread winter honey salt music coffee gold snow wood fire ice glass paper silk sugar iron sleep wind "
    "cheese tea rice smoke cotton sand butter milk wool clay thunder soap silver fog oil leather flour dust "
    "copper steel wine corn ink rubber wax coal marble grass amber"
)
K, NEW = 4, 20  # samples for each prompt, and their maximum number of tokens


def questions(things: list[str]) -> Dataset:
    """One row for each thing: the prompt, and the thing, for checks of the answer."""
    question = "What is {}? Answer in at most eight words."
    prompts = [[{"role": "user", "content": question.format(thing)}] for thing in things]
    return Dataset.from_dict({"prompt": prompts, "thing": things})


def right(thing: str, text: str) -> bool:
    """Whether an answer is right."""
    return 3 <= len(text.split()) <= 8 and thing in text.lower()


def program(rows: Any, first: Any, second: Any) -> list[float]:
    """A judge that prefers the right answer; 1/2 if both or none are right."""
    return [
        0.5 + (right(row["thing"], a) - right(row["thing"], b)) / 2
        for row, a, b in zip(rows, first, second, strict=True)
    ]


def chance(rows: Any, first: Any, second: Any) -> list[float]:
    """A judge with random probabilities, which depend on the two texts alone."""
    return [random.Random(f"{a} / {b}").random() for a, b in zip(first, second, strict=True)]


def described(pairs: list[dict[str, Any]]) -> dict[str, float]:
    """Mean strength of a trainer's pairs; of pairs with one right answer, the share in which it is the chosen one."""
    truth = [tuple(right(row["thing"], row[side][0]["content"]) for side in ("chosen", "rejected")) for row in pairs]
    decided = [chosen for chosen, rejected in truth if chosen != rejected]
    metrics = {"strength": mean(row["preference_prob"] for row in pairs)}
    return metrics | ({"pairs right": mean(decided)} if decided else {})


def evaluate(model: Any, tokenizer: Any, rows: Dataset, seed: int) -> dict[str, float]:
    """The share of right samples and their words; the model's judgment of right against wrong samples, if any."""
    repeated = [row for row in rows for _ in range(K)]
    ids = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in repeated]
    samples = sampling.responses(model.eval(), ids, tokens=NEW, seed=seed)
    texts = tokenizer.batch_decode(samples, skip_special_tokens=True)
    truth = [right(row["thing"], text) for row, text in zip(repeated, texts, strict=True)]
    metrics = {"right": mean(truth), "words": mean(len(text.split()) for text in texts)}
    groups = [range(i, i + K) for i in range(0, len(texts), K)]
    mixed = [(i, j) for group in groups for i in group for j in group if truth[i] and not truth[j]]
    if not mixed:
        return metrics
    better, worse = ([texts[pair[side]] for pair in mixed] for side in (0, 1))
    judge = judging.ModelJudge(model, tokenizer)
    quality = judging.quality(judge, [repeated[i] for i, _ in mixed], better, worse)
    return metrics | {"judge accuracy": quality.accuracy, "judge Brier": quality.brier}
