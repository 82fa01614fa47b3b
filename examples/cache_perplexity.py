"""What fewer bits in the cache of keys and values cost: nats of the 256 tokens after 1,024, beside the cache's bytes.

    python examples/cache_perplexity.py [--model smollm2] [--text pydoc] [--contexts 12] [--output out/cache_perplexity]

Each context is the start of a document. 1,023 tokens of it are read at once, with exact attention, and fill the cache;
the others are read one at a time, so that what is stored ages as in generation, and each gives the nats of the next.
What counts, decided beforehand: the nats of `8,4,2` against those of the flat arm with the nearest bytes, `RIVAL`.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
import typer
from cache_arms import ARMS, DENSE, RIVAL, STAIRCASE, held, installed, plot

from hf_xent import data
from hf_xent.experiments.study import Study
from hf_xent.generation.prefixes import cache_name
from hf_xent.models import loading

PROMPT, SCORED, ROWS = 1024, 256, 4


@torch.no_grad()
def main(
    model: str = "smollm2", text: str = "pydoc", contexts: int = 12, output: Path = Path("out/cache_perplexity")
) -> dict[str, dict[int, dict[str, float]]]:
    """Every arm on every context, each a "seed" of the study; returns the metrics."""
    metrics = ("nats", "perplexity", "bytes a token", "MiB at the end")
    study = Study("Caches", metrics, DENSE, output, contexts, {"model": model, "text": text})
    lm, tokenizer = loading.load(model)
    ids, arms, name = starts(tokenizer, text, contexts), installed(lm.config), cache_name(lm)
    filled = cache(lambda first: lm.base_model(ids[first : first + ROWS, : PROMPT - 1], use_cache=True)[name])
    for arm, context in study.runs(arms):
        if context in study.values(arm, "nats"):  # read with the first of its rows
            continue
        first = context - context % ROWS
        nats, sizes = continued(lm, filled(first), ARMS[arm](config=lm.config), ids[first : first + ROWS])
        size = {"bytes a token": sum(sizes) / len(sizes), "MiB at the end": sizes[-1] * (PROMPT + SCORED - 1) / 2**20}
        for row, value in enumerate(nats):
            study.record(arm, first + row, nats=value, perplexity=math.exp(value), **size)
    study.baseline = RIVAL
    mean, half = study.difference(STAIRCASE, "nats") or (math.nan, math.nan)
    study.baseline = DENSE
    plot(study, output / "cache_perplexity.png")
    missing = ", ".join(ARMS.keys() - set(arms)) or "none"
    return study.report(f"{STAIRCASE} against {RIVAL}: {mean:+.4f} ± {half:.4f} nats. Arms not installed: {missing}.")


def starts(tokenizer: Any, text: str, contexts: int) -> torch.Tensor:
    """The first tokens of the documents that are long enough, in the order of the source, [contexts, tokens]."""
    length = PROMPT + SCORED
    rows = (tokenizer(row, verbose=False)["input_ids"][:length] for row in data.load_text(text)["text"])
    long = [row for row in rows if len(row) == length][:contexts]
    if len(long) < contexts:
        raise ValueError(f"contexts is {contexts}, but {text} has {len(long)} documents of {length} tokens")
    return torch.tensor(long)


def continued(lm: Any, filled: Any, made: Any, ids: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean nats of each row's tokens after the prompt, and the cache's bytes per token and row after each of them."""
    for number, layer in enumerate(filled.layers):
        made.update(layer.keys, layer.values, number)
    nats, sizes, name = torch.zeros(len(ids), dtype=torch.float64), [], cache_name(lm)
    for at in range(PROMPT - 1, PROMPT + SCORED - 1):
        logits = lm(input_ids=ids[:, at : at + 1], **{name: made}).logits[:, -1]
        nats += torch.nn.functional.cross_entropy(logits.float(), ids[:, at + 1], reduction="none") / SCORED
        sizes.append(held(made) / len(ids) / (at + 1))
    return nats.tolist(), sizes


if __name__ == "__main__":
    typer.run(main)
