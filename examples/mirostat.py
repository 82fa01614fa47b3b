"""Sample a language model at a target surprise, and measure the surprise and the repetition of its samples.

    python examples/mirostat.py [--model smollm2] [--tokens 200] [--rows 8] [--seeds 3] [--output out/mirostat]

The prompt is one piece of prose, as in the paper. The surprise is that under the whole model, from a separate forward
pass over the samples. End tokens are excluded, so that all samples have the same length.
"""

import math
from pathlib import Path
from typing import Any

import torch
import typer

from hf_xent import patch
from hf_xent.experiments.study import Study
from hf_xent.generation import mirostat
from hf_xent.metrics import diversity
from hf_xent.models import loading

TARGETS = (2.5, 3.0, 3.5, 4.0)
ARMS: dict[str, dict[str, Any]] = {
    "plain sampling": {},
    **{f"target {target}": {"target": target} for target in TARGETS},
    "target 3.0, version 1": {"target": 3.0, "version": 1},
}
METRICS = ("surprise", "spread", "rep-6")
PROMPT = (
    "Claude Elwood Shannon was an American mathematician and engineer who is known as the father of information theory."
    " In 1948 he published"
)


def main(
    model: str = "smollm2", tokens: int = 200, rows: int = 8, seeds: int = 3, output: Path = Path("out/mirostat")
) -> dict[str, dict[int, dict[str, float]]]:
    """Every arm under every seed; returns the metrics."""
    settings = {"model": model, "tokens": tokens, "rows": rows}
    study = Study("Mirostat", METRICS, "plain sampling", output, seeds, settings)
    lm, tokenizer = loading.load(model)
    patch(lm.eval())
    prompts = tokenizer([PROMPT] * rows, return_tensors="pt").input_ids
    start = prompts.shape[1]
    for arm, seed in study.runs(ARMS):
        torch.manual_seed(seed)
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "attention_mask": torch.ones_like(prompts)}
        if options := ARMS[arm]:
            ids = mirostat.generate(lm, prompts, **options, **length)
        else:
            ids = lm.generate(prompts, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, **length)
        surprise = observed(lm, ids, start)
        metrics = {"surprise": surprise.mean().item(), "spread": surprise.std().item()}
        study.record(arm, seed, **metrics, **{"rep-6": diversity.repetition(ids[:, start:].tolist(), 6)})
    return study.report(
        f"Bits per token of {rows} samples of {tokens} tokens for each seed (mean over samples), their standard"
        " deviation over samples, and the share of repeated 6-grams. Made by `examples/mirostat.py` of hf_xent.",
        license="apache-2.0",
        base_model=model,
    )


@torch.no_grad()
def observed(lm: Any, sequences: torch.Tensor, start: int) -> torch.Tensor:
    """Mean surprise of each sequence's tokens from `start` on, bits [B]."""
    stats = lm(input_ids=sequences, labels=sequences).logits.stats(sequences, shift=True, outputs=("lse", "target"))
    return stats.nll[:, start - 1 : -1].mean(-1) / math.log(2)


if __name__ == "__main__":
    typer.run(main)
