"""Questions with one short answer, for a language model: what it learns, and how often its samples are right and agree.

The questions: the countries of 254 cities (the time zone database; no download), or any data with columns `question`
and `answer`. `accuracy` is the share of samples that are the answer, letter by letter; `consistency` the share of pairs
among samples of one question that agree. noisefit_qa.py trains on them.
"""

from __future__ import annotations

from itertools import combinations
from statistics import mean
from typing import Any

from datasets import Dataset

from hf_xent import data
from hf_xent.generation import sampling

SAMPLES, NEW, TEMPERATURE = 3, 6, 0.5  # of each question; tokens of an answer at most


def questions(source: str, tokenizer: Any) -> Dataset:
    """Questions and answers, and both as tokens; the answer alone is learned."""
    rows = data.load_text(source, column="question").select_columns(["question", "answer"])
    return rows.map(encode, fn_kwargs={"tokenizer": tokenizer}, desc="tokenize")


def encode(row: dict[str, str], tokenizer: Any) -> dict[str, list[int]]:
    prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
    answer = [*tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"prompt": prompt, "input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def answers(model: Any, tokenizer: Any, rows: Any, seed: int) -> dict[str, float]:
    """How often samples are right, and how often they agree."""
    prompts = [prompt for prompt in rows["prompt"] for _ in range(SAMPLES)]
    made = sampling.sample(model, prompts, tokens=NEW, seed=seed, temperature=TEMPERATURE)
    texts = [tokenizer.decode(tokens).strip() for tokens in made]
    asked = [texts[i : i + SAMPLES] for i in range(0, len(texts), SAMPLES)]
    right = mean(text == answer for found, answer in zip(asked, rows["answer"], strict=True) for text in found)
    return {"accuracy": right, "consistency": mean(a == b for found in asked for a, b in combinations(found, 2))}
