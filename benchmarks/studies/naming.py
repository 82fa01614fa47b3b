"""A task whose preferences are known: "name four fruits :" and answers such as "old pear , honestly , ripe apple ."

An answer has items, each a noun with an adjective, and remarks of one word. With r different items of the category, w
of others or repeated, and N the number that was asked for,

    u = -|N - r| - w                    the utility; 0 is the best, and remarks do not count
    P(a is preferred to b) = sigmoid((u_a - u_b) / SCALE)                               Bradley-Terry

Labels are drawn from this probability, as votes of annotators who err where two answers are nearly as good.
"""

from __future__ import annotations

import math
import random
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CATEGORIES = {
    "fruits": "apple pear plum cherry grape lemon melon peach",
    "tools": "hammer saw chisel pliers wrench drill rasp plane",
    "animals": "horse cow goat sheep rabbit fox wolf bear",
    "clothes": "coat shirt glove scarf sock skirt jacket boot",
}
NOUNS = {category: nouns.split() for category, nouns in CATEGORIES.items()}
CATEGORY = {noun: category for category, nouns in NOUNS.items() for noun in nouns}
ADJECTIVES = ["old", "new", "small", "large", "red", "black", "heavy", "light", "plain", "fine", "cheap", "rare"]
REMARKS = ["honestly", "frankly", "naturally", "certainly", "obviously", "basically"]
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
SCALE, END, PAD = 0.5, "<end>", "<pad>"
QUESTION, VERDICTS = "{prompt} {first} verdict", ("better", "worse")  # of an answer, compared with one that is not seen
LONGEST = 40  # tokens of an answer, at most


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word."""
    words = [
        PAD,
        END,
        "name",
        ":",
        ",",
        ".",
        "verdict",
        *VERDICTS,
        *NUMBERS.values(),
        *CATEGORIES,
        *ADJECTIVES,
        *REMARKS,
    ]
    vocabulary = {word: i for i, word in enumerate([*words, *CATEGORY])}
    level = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=level, pad_token=PAD, eos_token=END, bos_token=END)


def prompt(number: int, category: str) -> str:
    """The request for some items of a category."""
    return f"name {NUMBERS[number]} {category} :"


def prompts(*parts: int) -> list[str]:
    """The combinations of number and category in some of four parts."""
    grid = ((i, j, n, c) for i, n in enumerate(NUMBERS) for j, c in enumerate(NOUNS))
    return [prompt(n, c) for i, j, n, c in grid if (i + j) % 4 in parts]


def answer(rng: random.Random, request: str) -> str:
    """An answer as an untrained writer gives it: often too few or too many items, or one of another category."""
    _, word, category, _ = request.split()
    number = {name: n for n, name in NUMBERS.items()}[word]
    right = max(0, number + rng.choice((-2, -1, -1, 0, 1, 1, 2)))
    others = [noun for noun in CATEGORY if CATEGORY[noun] != category]
    nouns = rng.sample(NOUNS[category], right) + rng.sample(others, rng.choice((0, 0, 1, 1, 2)))
    parts = [f"{rng.choice(ADJECTIVES)} {noun}" for noun in nouns or [rng.choice(others)]]
    parts += rng.sample(REMARKS, rng.choice((0, 0, 1)))
    rng.shuffle(parts)
    return " , ".join(parts) + " ."


def utility(request: str, text: str) -> int:
    """u of an answer."""
    _, word, category, _ = request.split()
    nouns = [token for token in text.split() if token in CATEGORY]
    right = len({noun for noun in nouns if CATEGORY[noun] == category})
    number = {name: n for n, name in NUMBERS.items()}[word]
    return -abs(number - right) - (len(nouns) - right)


def probability(request: str, first: str, second: str) -> float:
    """The known probability that the first answer is preferred."""
    return 1 / (1 + math.exp((utility(request, second) - utility(request, first)) / SCALE))


def pairs(count: int, name: str, *parts: int) -> list[dict[str, Any]]:
    """Pairs of answers, and three votes for the first, each drawn from its known probability.

    Args:
        count: How many.
        name: They are determined by it.
        parts: Of the prompts.

    Returns:
        Rows of `prompt`, `first`, `second`, `p`, the probability that the first is preferred, and `votes`, each 0 or 1.
    """
    rng, rows, requests = random.Random(name), [], prompts(*parts)
    for _ in range(count):
        request = rng.choice(requests)
        first, second = answer(rng, request), answer(rng, request)
        p = probability(request, first, second)
        votes = [int(rng.random() < p) for _ in range(3)]
        rows.append({"prompt": request, "first": first, "second": second, "p": p, "votes": votes})
    return rows


def labelled(rows: list[dict[str, Any]], labels: list[float]) -> Dataset:
    """Rows of TRL's DPO from pairs and the probability that is believed of the first; the better one is chosen."""
    table = []
    for row, p in zip(rows, labels, strict=True):
        answers = [" " + row["first"], " " + row["second"]]
        chosen, rejected = answers if p >= 0.5 else answers[::-1]
        made = {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected, "preference_prob": max(p, 1 - p)}
        table.append(made | {"known": row["p"] if p >= 0.5 else 1 - row["p"]})
    return Dataset.from_list(table)


def lessons(count: int, seed: int, judged: float) -> list[tuple[str, str]]:
    """Prompts and answers to learn the task from, the quality of which is that of `answer`.

    A share of them are an answer and a verdict on it, a vote between it and another one, which is not shown; they are
    about the first two parts alone.
    """
    rng, found = random.Random(f"lessons {seed}"), []
    every, compared = prompts(0, 1, 2, 3), prompts(0, 1)
    for _ in range(count):
        if rng.random() >= judged:
            request = rng.choice(every)
            found.append((request, answer(rng, request)))
            continue
        request = rng.choice(compared)
        first, second = answer(rng, request), answer(rng, request)
        verdict = VERDICTS[rng.random() >= probability(request, first, second)]
        found.append((QUESTION.format(prompt=request, first=first), verdict))
    return found
