"""What fewer bits in the cache of keys and values cost: nats of the 256 tokens after 1,024, beside the cache's bytes.

    python examples/cache_perplexity.py [--model smollm2] [--text pydoc] [--contexts 12] [--output out/cache_perplexity]

Each context is the start of a document. 1,023 tokens of it are read at once, with exact attention, and fill the cache;
the others are read one at a time, so that what is stored ages as in generation, and each gives the nats of the next.
What counts, decided beforehand: the nats of `8,4,2` against `2, residual 96`, flat with 0.8 % fewer bytes on average.
"""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import typer
from cache_arms import ARMS, DENSE, RIVAL, STAIRCASE, held, installed, plot
from transformers import DynamicCache

from hf_xent import data
from hf_xent.experiments.study import Study
from hf_xent.generation.prefixes import cache_name
from hf_xent.models import loading

PROMPT, SCORED, ROWS = 1024, 256, 6
METRICS = ("nats", "perplexity", "bytes a token", "MiB at the end")


def main(
    model: str = "smollm2", text: str = "pydoc", contexts: int = 12, output: Path = Path("out/cache_perplexity")
) -> dict[str, dict[int, dict[str, float]]]:
    """Every arm on every context, each a "seed" of the study; returns the metrics."""
    study = Study("Caches", METRICS, DENSE, output, contexts, {"model": model, "text": text})
    lm, tokenizer = loading.load(model)
    ids, arms = starts(tokenizer, text, contexts), installed(lm.config)
    filled = cache(lambda first: read(lm, ids[first : first + ROWS, : PROMPT - 1], DynamicCache(config=lm.config))[0])
    for arm, context in study.runs(arms):
        if context in study.values(arm, "nats"):  # read with the first of its rows
            continue
        first = context - context % ROWS
        nats, sizes = continued(lm, filled(first), ARMS[arm](config=lm.config), ids[first : first + ROWS])
        size = sum(sizes) / len(sizes), sizes[-1] * (PROMPT + SCORED - 1) / 2**20
        for row, value in enumerate(nats, start=first):
            study.record(arm, row, **dict(zip(METRICS, (value, math.exp(value), *size), strict=True)))
    mean, half = replace(study, baseline=RIVAL).difference(STAIRCASE, "nats") or (math.nan, math.nan)
    plot(study, output / "cache_perplexity.png")
    text = f"{STAIRCASE} against {RIVAL}: {mean:+.4f} ± {half:.4f} nats, 95 % interval over contexts."
    return study.report(f"{text} Arms not installed: {', '.join(ARMS.keys() - set(arms)) or 'none'}.")


def starts(tokenizer: Any, text: str, contexts: int) -> torch.Tensor:
    """The first tokens of the documents that are long enough, in the order of the source, [contexts, tokens]."""
    length, texts = PROMPT + SCORED, data.load_text(text)["text"][:]
    long = [ids[:length] for ids in tokenizer(texts, verbose=False)["input_ids"] if len(ids) >= length][:contexts]
    if len(long) < contexts:
        raise ValueError(f"contexts is {contexts}, but {text} has {len(long)} documents of {length} tokens")
    return torch.tensor(long)


@torch.no_grad()
def read(lm: Any, ids: torch.Tensor, made: Any) -> tuple[Any, torch.Tensor]:
    """A cache with some more tokens, and the logits [B, V] after the last of them."""
    return made, lm(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_name(lm): made}).logits[:, -1]


def continued(lm: Any, filled: Any, made: Any, ids: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean nats of each row's tokens after the prompt, and the cache's bytes per token and row after each of them."""
    for number, layer in enumerate(filled.layers):
        made.update(layer.keys, layer.values, number)
    nats, sizes = torch.zeros(len(ids), dtype=torch.float64), []
    for at in range(PROMPT - 1, PROMPT + SCORED - 1):
        logits = read(lm, ids[:, at : at + 1], made)[1].float()
        nats += torch.nn.functional.cross_entropy(logits, ids[:, at + 1], reduction="none") / SCORED
        sizes.append(held(made) / len(ids) / (at + 1))
    return nats.tolist(), sizes


if __name__ == "__main__":
    typer.run(main)
