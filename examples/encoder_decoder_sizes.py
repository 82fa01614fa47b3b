"""Sizes of encoder and decoder: a grid of small models that write the tags of a sentence, and a law of their losses.

    python examples/encoder_decoder_sizes.py brown:FOLDER [--seeds 3] [--output out/encoder_decoder]

Inner layers of four widths in either half make 16 models (tag_models.py; NOT translation, see word_tags.py), trained
for as many steps under one learning rate, which was not tuned. `L = alpha (unit / Ne)^pe (unit / Nd)^pd + floor` of
Ghorbani et al. 2021 (arXiv:2109.07740) is fitted to losses of held-out sentences; Ne and Nd are parameters without
embeddings. Two models are held out of each seed's fit: the largest, and one inside the grid. A refused fit is nan.
Decided before: the law forecasts if the mean of its errors on both is less, in each seed, than that of every control:
the mean of the fitted losses, the loss of the largest fitted model, and a power law of Ne + Nd. The best share of the
encoder, pe / (pe + pd), is known if its interval, a bootstrap over the losses of all seeds, excludes one half.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tag_models
import typer
from encoder_decoder_law import LARGEST, LAW, MEAN, SUM, forecast, summary
from word_tags import WordTags

from hf_xent.experiments.study import Study

WIDTHS = (16, 64, 192, 512)
NAMES = {f"encoder {e}, decoder {d}": (e, d) for e in WIDTHS for d in WIDTHS}
HELD = [(512, 512), (64, 192)]
KEPT = (192, 192)  # the models that tag_information.py reads
METRICS, COLUMNS = ("mean %", "largest %", "inside %"), ("encoder", "decoder", "loss")


def cell(data: WordTags, sizes: tuple[int, int], steps: int, seed: int, output: Path) -> dict[str, float]:
    """Parameters of both halves of a model, and what it has learned."""
    model = tag_models.train(tag_models.new(*sizes, seed), data.train, steps, seed, str(output / "run"))
    if sizes == KEPT:
        model.save_pretrained(output / "models" / f"seed-{seed}")
    found, halves = tag_models.measured(model, data.test), (model.model.encoder, model.model.decoder)
    counts = [sum(p.numel() for p in half.layers.parameters()) for half in halves]
    return {"accuracy": found.accuracy, **dict(zip(COLUMNS, (*counts, found.mean), strict=True))}


def main(source: str, steps: int = 600, seeds: int = 3, output: Path = Path("out/encoder_decoder")) -> dict[str, Any]:
    """All models of all seeds; returns the errors of forecasts, in percent of the loss, by arm and seed."""
    settings = {"source": source.partition(":")[0], "steps": steps, "rate": tag_models.RATE}
    grid = Study("Models", ("loss", "accuracy"), next(iter(NAMES)), output / "grid", seeds, settings)
    data, note = WordTags(source), "Made by `examples/encoder_decoder_sizes.py` of hf_xent. NOT translation."
    for name, seed in grid.runs(NAMES):
        grid.record(name, seed, **cell(data, NAMES[name], steps, seed, output))
    grid.report(f"{note} Widths of inner layers.")
    rows = {(NAMES[n], s): [row[c] for c in COLUMNS] for n, found in grid.results.items() for s, row in found.items()}
    study = Study("Forecasts", METRICS, LARGEST, output, seeds, settings)
    for arm, seed in study.runs([LAW, SUM, LARGEST, MEAN]):
        known = np.array([row for (sizes, of), row in rows.items() if of == seed and sizes not in HELD])
        held = np.array([rows[sizes, seed] for sizes in HELD])
        errors = 100 * np.abs(forecast(arm, known, held) / held[:, 2] - 1)
        study.record(arm, seed, **dict(zip(METRICS, (errors.mean(), *errors), strict=True)))
    return study.report(f"{note} {summary(np.array([*rows.values()]), output)}")


if __name__ == "__main__":
    typer.run(main)
