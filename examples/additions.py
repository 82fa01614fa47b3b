"""Additions by a small language model: one answer out of four paths, drawn in a path nucleus or one by one.

    python examples/additions.py [--model smollm2] [--additions 200] [--seeds 3] [--output out/additions]

Four solved additions, then one of two-digit numbers; each seed has its own 200. All ways but greedy decoding take four
rows of forward passes for each addition, in bfloat16. The prompt was chosen by greedy accuracy and cost on other ones.

Decided beforehand: path nucleus with weighted votes counts as better if its accuracy exceeds that of top-p samples with
equal votes by more than half of the 95 % interval over seeds. Controls: the same samples weighted by their
probabilities, each sequence once; the likeliest path alone; beam search; stochastic beams. No gain is expected.
"""

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import typer

from hf_xent.experiments.study import Study
from hf_xent.generation import paths
from hf_xent.generation.voting import majority
from hf_xent.models import loading

SOLVED, ASKED, BATCH = [(12, 35), (48, 27), (63, 81), (90, 16)], "{} + {} = ", 20
WAYS: dict[str, tuple[dict[str, Any], list[str]]] = {  # how rows are drawn, and how an answer is chosen
    "greedy": ({"do_sample": False}, ["only row"]),
    "beam search": ({"do_sample": False, "num_beams": 4}, ["only row"]),
    "top-p": ({"paths": 1}, ["equal votes", "weighted votes"]),  # four times
    "path nucleus": ({"paths": 4, "num_return_sequences": 4}, ["weighted votes", "likeliest path"]),
    "stochastic beams": ({"paths": 4, "num_return_sequences": 4, "stochastic_beam": True}, ["weighted votes"]),
}


def main(model: str = "smollm2", additions: int = 200, seeds: int = 3, output: Path = Path("out/additions")) -> Any:
    """Every arm under every seed; returns the metrics."""
    settings, metrics = {"model": model, "additions": additions, "batch": BATCH}, ("accuracy", "any", "answers")
    study = Study("Additions", metrics, "top-p: equal votes", output, seeds, settings)
    lm, tokenizer = loading.load(model, dtype="bfloat16")
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(99).shuffle(pairs)
    pairs = [pair for pair in pairs[400:] if pair not in SOLVED]  # the first were for the choice of a prompt
    asked = [pairs[additions * seed :][:additions] for seed in range(seeds)]
    drawn = lru_cache(maxsize=1)(lambda way, seed: [*rows(lm, tokenizer, way, seed, asked[seed])])
    for arm, seed in study.runs([f"{way}: {vote}" for way, (_, votes) in WAYS.items() for vote in votes]):
        way, vote = arm.split(": ")
        right = hit = distinct = 0
        for (a, b), (answers, weights) in zip(asked[seed], drawn(way, seed), strict=True):
            voted = majority(answers, weights if vote == "weighted votes" else None)
            right += (answers[0] if vote == "likeliest path" else voted) == a + b
            hit += a + b in answers
            distinct += len({*answers} - {None})
        study.record(arm, seed, accuracy=right / additions, any=hit / additions, answers=distinct / additions)
    return study.report("Shares right, and right in any row; distinct answers.", license="apache-2.0", base_model=model)


def rows(lm: Any, tokenizer: Any, way: str, seed: int, pairs: list[tuple[int, int]]) -> Any:
    """For each addition the answers of its rows, and their weights."""
    torch.manual_seed(seed)
    solved, line = "".join(f"{ASKED.format(a, b)}{a + b}\n" for a, b in SOLVED), tokenizer("\n").input_ids[0]
    for i in range(0, len(pairs), BATCH):
        ids = tokenizer([solved + ASKED.format(a, b) for a, b in pairs[i : i + BATCH]], return_tensors="pt").input_ids
        ids, count = ids.repeat_interleave(4, 0) if way == "top-p" else ids, len(ids)
        options = {"max_new_tokens": 4, "eos_token_id": [line, tokenizer.eos_token_id], "pad_token_id": line}
        options |= {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True} | WAYS[way][0]
        output = paths.generate(lm, ids, **options) if "paths" in options else lm.generate(ids, **options)
        new = output.sequences[:, ids.shape[1] :].view(count, -1, output.sequences.shape[1] - ids.shape[1]).tolist()
        weights = output.log_probs.exp() if way == "top-p" else output.get("weights", torch.ones(count))
        for sequences, shares in zip(new, weights.view(count, -1).tolist(), strict=True):
            texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in sequences]
            once = [x * (row not in sequences[:j]) for j, (row, x) in enumerate(zip(sequences, shares, strict=True))]
            yield [int(text) if text.isdecimal() else None for text in texts], once  # top-p samples may repeat


if __name__ == "__main__":
    typer.run(main)
