"""Questions with one short answer: data for a language model, and how often its samples are right and agree.

The questions ask for the countries of 254 cities (the time zone database; no download), or are any data with columns
`question` and `answer`. `accuracy` is the share of samples that equal the answer; `consistency` is the share of pairs
of samples of one question that agree. noisefit_qa.py trains on them.
"""

from __future__ import annotations

from itertools import combinations
from statistics import mean
from typing import Any

from datasets import Dataset

from hf_xent import data
from hf_xent.generation import sampling

SAMPLES, NEW, TEMPERATURE = 3, 6, 0.5  # samples of each question, their maximum number of tokens, their temperature


def questions(source: str, tokenizer: Any) -> Dataset:
    """Questions and answers, and both as tokens; only the answer has labels."""
    rows = data.load_text(source, column="question").select_columns(["question", "answer"])
    return rows.map(encode, fn_kwargs={"tokenizer": tokenizer}, desc="tokenize")


def encode(row: dict[str, str], tokenizer: Any) -> dict[str, list[int]]:
    prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
    answer = [*tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"prompt": prompt, "input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def answers(model: Any, tokenizer: Any, rows: Any, seed: int) -> dict[str, float]:
    """How often samples are right, and how often they agree."""
    prompts = [prompt for prompt in rows["prompt"] for _ in range(SAMPLES)]
    samples = sampling.sample(model, prompts, tokens=NEW, seed=seed, temperature=TEMPERATURE)
    texts = [tokenizer.decode(tokens).strip() for tokens in samples]
    groups = [texts[i : i + SAMPLES] for i in range(0, len(texts), SAMPLES)]
    accuracy = mean(text == answer for group, answer in zip(groups, rows["answer"], strict=True) for text in group)
    return {"accuracy": accuracy, "consistency": mean(a == b for group in groups for a, b in combinations(group, 2))}
