"""A task's loss and score against the words of pre-training: two laws, and pre-training that cannot help as a control.

    python examples/downstream_law.py brown:FOLDER [--seeds 3] [--output out/downstream]

The pre-training restores running text of the Brown corpus, in pieces of 12 words of which 30 % are hidden; it reads
each piece once, and its weights are kept after D words. Each is then trained for the same steps on the same 1,000
sentences to write their tags (word_tags.py; NOT translation). The score is the accuracy of tags of held-out sentences,
in percent. In the control, words within a piece are in random order, in what is read and what is restored alike.
Isik et al. 2024 (arXiv:2402.04177): loss = E + A / D^alpha, score = (log(A D^alpha))^beta. Both are fitted to all D but
the largest, and forecast that one; a refused fit is nan.
Decided before: a law forecasts if its error is less, in each seed, than that of the last value. The pre-training is
aligned if its score at the largest D exceeds the control's, with an interval over seeds that excludes 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tag_models
import typer
from transformers import TrainerCallback
from word_tags import UNKNOWN, Row, WordTags

from hf_xent import laws
from hf_xent.experiments.study import Study

PIECE, HIDDEN, FIXED, WIDTH = 12, 0.3, 1000, 192
STEPS = (30, 60, 120, 240, 480, 960)  # of pre-training
ALIGNED, CONTROL, NOTHING = "running text", "words in random order", "no pre-training"
LAW, LAST, MEAN = "law", "the last value", "the mean"
WORDS = [steps * tag_models.BATCH * PIECE for steps in STEPS]


class Keep(TrainerCallback):
    """Copies of the weights after some steps."""

    def __init__(self, steps: tuple[int, ...]):
        self.steps, self.kept = steps, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.kept.append({name: value.clone() for name, value in kwargs["model"].state_dict().items()})


def pieces(text: list[int], arm: str, seed: int) -> list[Row]:
    """Running text to restore, piece by piece in random order."""
    rng = np.random.default_rng(seed)
    whole = rng.permutation(np.array(text[: len(text) // PIECE * PIECE]).reshape(-1, PIECE))
    if arm == CONTROL:
        whole = rng.permuted(whole, axis=1)
    seen = np.where(rng.random(whole.shape) < HIDDEN, UNKNOWN, whole)
    return [{"input_ids": a, "labels": b} for a, b in zip(seen.tolist(), whole.tolist(), strict=True)]


def results(data: WordTags, arm: str, steps: int, seed: int, output: str) -> list[tuple[float, float]]:
    """Loss and score after each D, or without pre-training."""
    model, keep = tag_models.new(WIDTH, WIDTH, seed), Keep(STEPS)
    if arm != NOTHING:
        constant = {"lr_scheduler_type": "constant_with_warmup", "train_sampling_strategy": "sequential"}
        tag_models.train(model, pieces(data.text, arm, seed), STEPS[-1], seed, output, callbacks=[keep], **constant)
    found = []
    for weights in keep.kept or [model.state_dict()]:
        model = tag_models.new(WIDTH, WIDTH, seed)
        model.load_state_dict(weights)
        tag_models.train(model, data.train[:FIXED], steps, seed, output)
        losses = tag_models.measured(model, data.test)
        found.append((losses.mean, 100 * losses.accuracy))
    return found


def forecast(arm: str, law: str, values: list[float]) -> float:
    """The value at the largest D, from the others."""
    if arm != LAW:
        return values[-1] if arm == LAST else float(np.mean(values))
    try:
        return laws.fit(law, {"tokens": np.array(WORDS[:-1])}, np.array(values)).predict(tokens=WORDS[-1:]).loss[0]
    except ValueError as error:
        print(f"{law}: {error}")
        return float("nan")


def main(source: str, steps: int = 100, seeds: int = 3, output: Path = Path("out/downstream")) -> dict[str, Any]:
    """All runs; returns the errors of forecasts, in percent of the loss or the score, by arm and seed."""
    settings = {"source": source.partition(":")[0], "steps": steps, "rate": tag_models.RATE}
    names = {kind: [f"{kind} {count // 1000}k" for count in WORDS] for kind in ("loss", "score")}
    runs = Study("Pre-trained", (*names["loss"], *names["score"]), CONTROL, output / "runs", seeds, settings)
    data = WordTags(source)
    for arm, seed in runs.runs([ALIGNED, CONTROL, NOTHING]):
        found = zip(names["loss"], names["score"], results(data, arm, steps, seed, str(output / "run")), strict=False)
        runs.record(arm, seed, **{k: v for a, b, (x, y) in found for k, v in ((a, x), (b, y))})
    note = "Made by `examples/downstream_law.py` of hf_xent. Columns are words of pre-training. NOT translation."
    runs.report(f"{note} What has no pre-training stands in the first columns.")
    cases = {f"{kind} %, {arm}": (kind, arm) for arm in (ALIGNED, CONTROL) for kind in names}
    study = Study("Forecasts of the largest D", tuple(cases), LAST, output, seeds, settings)
    for arm, seed in study.runs([LAW, LAST, MEAN]):
        errors = {}
        for case, (kind, of) in cases.items():
            *known, truth = (runs.results[of][seed][name] for name in names[kind])
            predicted = forecast(arm, "downstream" if kind == "loss" else "log", known)
            errors[case] = 100 * abs(predicted / truth - 1)
        study.record(arm, seed, **errors)
    return study.report(note)


if __name__ == "__main__":
    typer.run(main)
