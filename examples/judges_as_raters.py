"""One small language model asked in six formats, as six raters of sentences with a known share of wrong words.

    python examples/judges_as_raters.py brown:package [--model smollm2] [--output out/judges_as_raters]

A seed draws 60 sentences, 12 of each degree 0 to 4: that many quarters of their words are replaced by others of the
corpus (`wrong_words.py`). Every format asks for three criteria, and has five ordered verdicts, calibrated by those on
texts without content; the expected verdicts of all formats together are cut into four categories of equal size. The
measure is that of a many-facet Rasch model. Without the calibration it had no estimate, which was the first design: a
format gave nearly every sentence the same verdict, its first digit or letter.

Decided before: the number that counts is Spearman's correlation with minus the degree. Where all formats judge all
sentences, the measure orders them as the raw mean does, up to ties; so the comparison is that of two formats a
sentence, drawn by the seed, where raw means mix sentences with severities. The measure helps if the 95 % interval of
its difference to the raw mean is above 0. Formats whose infit is outside of 0.5 to 1.5 are misfits; an arm is without
them, unless fewer than two would be left. Control: the measure against shuffled degrees, which should be about 0. The
model's loss of the sentence, without a question, was added later: it tells whether the model sees the degree at all.
`spread` is the severity of the strictest format less that of the mildest, in logits. verdicts.jsonl keeps verdicts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from wrong_words import CRITERIA, FORMATS, sentences

from hf_xent import detection, rasch
from hf_xent.experiments.study import Study
from hf_xent.generation.labelers import label
from hf_xent.metrics.labels import of_order
from hf_xent.models import loading

TEXTS, LEVELS, JUDGES, CONTENT_FREE = 60, 4, 2, ("N/A", "[MASK]", "")
METRICS = ("spearman", "spread", "reliability", "misfits")
ARMS = ("raw mean of two", "measure of two", "raw mean", "measure", "no misfits", "shuffled degrees", "model's loss")


def measured(cells: dict[str, list[Any]], degrees: np.ndarray) -> dict[str, dict[str, float]]:
    """Arm -> its numbers: of the raw mean, of the measure, without misfits, and against shuffled degrees."""
    fit = clean = rasch.fit(cells, item="criterion", rater="format", extremes="drop")
    if len(misfits := fit.raters.misfits(0.5, 1.5)) < len(fit.raters.names) - 1:
        clean = rasch.drop_misfits(fit, extremes="drop")
    numbers = {"spread": np.ptp(fit.raters.severity), "reliability": fit.reliability, "misfits": len(misfits)}
    for row in fit.raters.rows():
        numbers |= {f"{part} of {row['name']}": row[part] for part in ("severity", "se", "infit", "outfit")}
    scores = np.bincount(cells["unit"], cells["score"]) / np.bincount(cells["unit"])
    shuffled = np.random.default_rng(0).permutation(degrees)
    of = {"measure": (fit, degrees), "no misfits": (clean, degrees), "shuffled degrees": (fit, shuffled)}
    found = {arm: of_order(one.theta, -known[list(one.units)]) for arm, (one, known) in of.items()}
    return {"raw mean": of_order(scores, -degrees), **found, "measure": {**found["measure"], **numbers}}


def main(
    corpus: str, model: str = "smollm2", seeds: int = 3, output: Path = Path("out/judges_as_raters")
) -> dict[str, Any]:
    network, tokenizer = loading.load(model, dtype=torch.float32)
    settings = {"model": Path(model).name, "corpus": corpus.partition(":")[0], "texts": TEXTS, "levels": LEVELS}
    study = Study("Formats as raters", METRICS, ARMS[0], output, seeds, settings)
    for seed in sorted({seed for _, seed in study.runs(ARMS)}):
        texts, degrees = sentences(corpus, seed, TEXTS)
        options = {"tokenizer": tokenizer, "batch_size": 18, "cache": output / "verdicts.jsonl"}
        free = label(network, CONTENT_FREE, CRITERIA, FORMATS, **options)
        cells = label(network, texts, CRITERIA, FORMATS, **options).calibrated(free).cells(LEVELS)
        draw = np.random.default_rng(seed)
        chosen = np.stack([draw.permutation(len(FORMATS)) < JUDGES for _ in texts])  # [texts, formats]
        kept = np.broadcast_to(chosen[:, None], (len(texts), len(CRITERIA), len(FORMATS))).ravel()
        part = {name: [v for v, keep in zip(column, kept, strict=True) if keep] for name, column in cells.items()}
        found = measured(cells, degrees)
        found |= {f"{arm} of two": row for arm, row in measured(part, degrees).items()}
        found["model's loss"] = of_order(-detection.score("loss", network, tokenizer, texts), -degrees)
        for arm in ARMS:
            study.record(arm, seed, **found[arm])
    return study.report(f"Made by `examples/judges_as_raters.py` of hf_xent.\n\n{__doc__}")


if __name__ == "__main__":
    typer.run(main)
