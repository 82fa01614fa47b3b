"""Which texts of a mixed pool should a model be trained on for one genre? Selections compared at equal tokens.

    python examples/data_selection.py brown:package [--genre h] [--tokens 32768] [--seeds 3] [--output out/selection]

A small GPT-2 is trained on general text (`before`), and from there on what each arm selects; `target alone` is trained
on the target's own texts, and is the tuned model of `loss`. Decided beforehand: what counts is the loss on held-out
documents of the genre, nats a token; compression has helped if its 95 % interval of differences over seeds lies below
zero, to `random` and to both arms of length alone. `precision` is the share of the selected texts that are of the
genre, `length` the rank correlation of an arm's scores with the length. The seed determines documents, pool, models.
"""

from pathlib import Path
from typing import Any

import numpy as np
import typer
from mixed_pool import mixed
from scipy.stats import spearmanr
from small_lm import SmallLM

from hf_xent.data import select
from hf_xent.experiments.selecting import losses_of
from hf_xent.experiments.study import Study

ARMS = {
    "random": "random:seed={seed}", "shortest": "length", "longest": "length:longest=True",
    "compression": "compression", "compression, as published": "compression:normalise=None",
    "n-grams": "ngrams", "n-grams, mean": "ngrams:mean=True", "loss": "loss",
}  # fmt: skip
METRICS, CONTROLS = ("loss", "precision", "length"), ("shortest", "longest")
BASE_TOKENS, EPOCHS, SCORED = 512_000, 3, 120  # of `before`; over the target; tokens of a text that `loss` reads


class Task:
    """The texts and the models of one seed."""

    def __init__(self, corpus: str, genre: str, seed: int, folder: Path):
        self.parts = mixed(corpus, genre, seed)
        self.texts = [piece.text for piece in self.parts.pool]
        self.fits = np.array([piece.genre == genre for piece in self.parts.pool])
        self.lm, self.seed = SmallLM(self.parts.general, BASE_TOKENS, seed, folder), seed

    def tuned(self) -> Any:
        """The model trained on the target."""
        return self.lm.trained(self.parts.target, epochs=EPOCHS)

    def measured(self, arm: str, tokens: int) -> dict[str, float]:
        """Train on what an arm selects, and measure."""
        if arm in ("before", "target alone"):
            return {"loss": self.lm.loss(self.lm.model() if arm == "before" else self.tuned(), self.parts.held_out)}
        by = ARMS[arm].format(seed=self.seed)
        options: dict[str, Any] = {"draft": self.lm.folder / f"{by.partition(':')[0]}.draft"}
        if by == "loss":
            models = self.tuned(), self.lm.model(), self.lm.tokenizer
            options["losses"] = losses_of(self.texts, *models, max_tokens=SCORED)
        order, scores = select(self.texts, self.parts.target, len(self.texts), by, **options)
        counts = [len(ids) + 1 for ids in self.lm.tokenizer(self.texts)["input_ids"]]  # each text ends with a token
        chosen = order[: np.searchsorted(np.cumsum(np.array(counts)[order]), tokens) + 1]
        model = self.lm.trained([self.texts[i] for i in chosen], tokens)
        found = {"loss": self.lm.loss(model, self.parts.held_out), "precision": self.fits[chosen].mean()}
        return {**found, "length": spearmanr(scores, [len(text) for text in self.texts]).statistic}


def main(
    corpus: str, genre: str = "h", tokens: int = 32_768, seeds: int = 3, output: Path = Path("out/selection")
) -> Any:
    """Every arm under every seed; returns the metrics by arm and seed."""
    settings, tasks = {"corpus": corpus, "genre": genre, "tokens": tokens}, {}
    study = Study("Selection for one genre", METRICS, "random", output, seeds, settings)
    for arm, seed in study.runs(["before", "target alone", *ARMS]):
        tasks = tasks if seed in tasks else {seed: Task(corpus, genre, seed, output / f"seed-{seed}")}
        study.record(arm, seed, **tasks[seed].measured(arm, tokens))
    controls = [Study(study.name, METRICS, name, output, seeds, settings) for name in CONTROLS]
    gaps = [(control.baseline, *control.difference("compression", "loss")) for control in controls]
    text = "; ".join(f"compression to {name}: {mean:+.3g} ± {half:.2g}" for name, mean, half in gaps)
    return study.report(f"Made by `examples/data_selection.py` of hf_xent. Loss, {text}.")


if __name__ == "__main__":
    typer.run(main)
