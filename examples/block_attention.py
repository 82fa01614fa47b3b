"""Blocks of keys that take part with a probability: a language model's loss against the share of pairs that is kept.

    python examples/block_attention.py [--model smollm2] [--text pydoc] [--output out/blocks]   # 3 seeds

SmolLM2-135M reads texts of 1,024 tokens and predicts the last 512, without training for it. Blocks of 64 tokens are
kept with probability 1/2^(d-1), .8^(d-1) or 1/d, with and without the weights that make sums unbiased. Controls of the
same expected cost: a sliding window, and a window with the first four tokens. A seed draws the texts and the blocks.
Biases by distance that keep everything, harmonic and ALiBi, read the same texts.

What counts, decided beforehand: nats a token less those of the window with the first four tokens at the same cost; an
arm is better if the 95 % interval is below 0. Biases by distance, and arms that always keep the first block, were added
when seed 0 had shown that the first tokens decide. Time is not measured: on a CPU nothing is skipped.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import typer
from beyond_window import nats

from hf_xent import data
from hf_xent.attention import Harmonic, Linear, Probabilistic, Window, attending
from hf_xent.experiments.study import Study
from hf_xent.models import loading

LENGTH, SCORED, TEXTS, BLOCK, FIRST = 1024, 512, 3, 64, 4
FALLS = {
    "1/2^(d-1)": Probabilistic(BLOCK, rate=0.5), ".8^(d-1)": Probabilistic(BLOCK, rate=0.8),
    "1/d": Probabilistic(BLOCK, "inverse"), "1/2^(d-1), the first block": Probabilistic(BLOCK, rate=0.5, first=True),
    "1/d, the first block": Probabilistic(BLOCK, "inverse", first=True),
}  # fmt: skip
OWN = {"per_head": True, "per_layer": True}
DRAWS = {"": {}, ", unbiased": {"unbiased": True}, ", a draw a head and layer": OWN,
         ", unbiased, a draw a head and layer": {"unbiased": True, **OWN}}  # fmt: skip
METRICS = ("nats", "share", "over the window", "over the window with the first tokens")


def same_cost(bias: Probabilistic, first: int) -> Window:
    """The window whose share of pairs is nearest to that which is expected of a bias."""
    share = bias.share(LENGTH)
    return min((Window(size, first) for size in range(1, LENGTH + 1)), key=lambda w: abs(w.share(LENGTH) - share))


def arms(seed: int) -> dict[str, tuple[Any, str]]:
    """Arm -> its bias, and the fall that has the same cost; those that others are compared with come first."""
    found: dict[str, tuple[Any, str]] = {"dense": (None, ""), "harmonic": (Harmonic(), ""), "ALiBi": (Linear(), "")}
    for name, fall in FALLS.items():
        found |= {f"window, as {name}": (same_cost(fall, 0), name), f"first, as {name}": (same_cost(fall, FIRST), name)}
        for how, options in DRAWS.items():
            if not how.endswith("layer") or name == "1/d":
                found[name + how] = (replace(fall, seed=seed, **options), name)
    return found


def main(model: str = "smollm2", text: str = "pydoc", seeds: int = 3, output: Path = Path("out/blocks")) -> Any:
    """Every arm under every seed."""
    loaded, tokenizer = loading.load(model)
    rows = torch.tensor(data.pack(data.load_text(text), tokenizer, block_size=LENGTH)["input_ids"][:])
    settings = {"model": model, "text": text, "texts": TEXTS, "length": LENGTH, "block": BLOCK}
    study = Study("Drawn blocks", METRICS, "dense", output, seeds, settings)
    for arm, seed in study.runs(arms(0)):
        bias, fall = arms(seed)[arm]
        texts = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:TEXTS]]
        with nullcontext() if bias is None else attending(loaded, bias):
            found = {"nats": nats(loaded, texts, LENGTH, SCORED), "share": bias.share(LENGTH) if fall else 1.0}
        for control, metric in zip(("window", "first"), METRICS[2:], strict=True):
            if fall and arm != (other := f"{control}, as {fall}") and seed in study.values(other, "nats"):
                found[metric] = found["nats"] - study.values(other, "nats")[seed]
        study.record(arm, seed, **found)
    return study.report("Nats a token, expected share of pairs. Made by `examples/block_attention.py` of hf_xent.")


if __name__ == "__main__":
    typer.run(main)
