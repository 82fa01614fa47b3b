"""The cost of five scores relative to the loss alone: their time over that of a plain forward of the patched model.

    python examples/scoring_cost.py [--model smollm2] [--texts 16] [--tokens 128] [--repetitions 9]

A plain forward is `model(input_ids, labels).loss` over the same batches of token ids; scoring includes the tokenizer.
The two alternate, so that other load on the machine affects both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import typer

import hf_xent
from hf_xent import data, detection
from hf_xent.models import loading
from hf_xent.patching import head_of

SCORES = ("loss", "zlib", "min_k", "min_k_pp", "dc_pdd")


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(model: str = "smollm2", texts: int = 16, tokens: int = 128, repetitions: int = 9) -> list[float]:
    """The ratio of every repetition."""
    loaded, tokenizer = loading.load(model)
    hf_xent.patch(loaded.eval())
    ids = tokenizer(" ".join(data.load_text("pydoc")["text"][:40]), verbose=False)["input_ids"]
    drawn = [
        tokenizer.decode(ids[i * tokens : (i + 2) * tokens]) for i in range(texts)
    ]  # longer texts, which the scorer cuts
    q = detection.frequencies(tokenizer, vocabulary=head_of(loaded).weight.shape[0])
    scorer = detection.TextScorer(loaded, tokenizer, SCORES, frequencies=q, max_tokens=tokens - 1, progress=False)
    rows = torch.tensor([row for _, row in scorer.tokenize(drawn)])

    @torch.no_grad()
    def plain() -> None:
        for batch in rows.split(scorer.batch_size):
            loaded(input_ids=batch, labels=batch, use_cache=False)

    ratios = []
    for repetition in range(repetitions + 1):
        pair = seconds(plain), seconds(lambda: scorer(drawn))
        if repetition:  # the first one is a warm-up
            ratios.append(pair[1] / pair[0])
            print(f"plain {pair[0]:.2f} s, scores {pair[1]:.2f} s, ratio {ratios[-1]:.3f}")
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    median = statistics.median(ratios)
    print(f"{texts} texts of {tokens} tokens: median ratio {median:.3f}, quartiles {low:.3f} {high:.3f}")
    return ratios


if __name__ == "__main__":
    typer.run(main)
