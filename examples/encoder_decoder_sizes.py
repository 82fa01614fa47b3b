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
from word_tags import WordTags

from hf_xent import laws
from hf_xent.experiments import law_figures
from hf_xent.experiments.study import Study

WIDTHS = (16, 64, 192, 512)
NAMES = {f"encoder {e}, decoder {d}": (e, d) for e in WIDTHS for d in WIDTHS}
HELD = [(512, 512), (64, 192)]
KEPT = (192, 192)  # the models that tag_information.py reads
LAW, CONTROLS = "encoder-decoder law", ("power law of the sum", "the largest fitted model", "the mean")
METRICS = ("mean %", "largest %", "inside %")


def cell(data: WordTags, sizes: tuple[int, int], steps: int, seed: int, output: Path) -> dict[str, float]:
    """Parameters of both halves, and what their model has learned."""
    model = tag_models.new(*sizes, seed)
    tag_models.train(model, data.train, steps, seed, str(output / "run"), train_sampling_strategy="group_by_length")
    if sizes == KEPT:
        model.save_pretrained(output / "models" / f"seed-{seed}")
    found, halves = tag_models.measured(model, data.test), (model.model.encoder, model.model.decoder)
    counts = [sum(p.numel() for p in half.layers.parameters()) for half in halves]
    return {"loss": found.mean, "accuracy": found.accuracy, "encoder": counts[0], "decoder": counts[1]}


def forecast(arm: str, known: Any, held: Any) -> Any:
    """The losses of models held out, from the encoders, decoders and losses, [3, models], of the others."""
    encoder, decoder, loss = known
    try:
        if arm == LAW:
            fit = laws.fit("encoder_decoder", {"encoder": encoder, "decoder": decoder}, loss)
            return fit.predict(encoder=held[0], decoder=held[1]).loss
        if arm == CONTROLS[0]:
            return laws.fit("power", {"x": encoder + decoder}, loss).predict(x=held[0] + held[1]).loss
    except ValueError as error:
        print(f"{arm}: {error}")
        return np.full(len(HELD), np.nan)
    return np.full(len(HELD), loss[(encoder + decoder).argmax()] if arm == CONTROLS[1] else loss.mean())


def main(source: str, steps: int = 500, seeds: int = 3, output: Path = Path("out/encoder_decoder")) -> dict[str, Any]:
    """All models of all seeds; returns the errors of forecasts, in percent of the loss, by arm and seed."""
    settings = {"source": source.partition(":")[0], "steps": steps, "rate": tag_models.RATE}
    grid = Study("Models", ("loss", "accuracy"), next(iter(NAMES)), output / "grid", seeds, settings)
    data = WordTags(source)
    for name, seed in grid.runs(NAMES):
        grid.record(name, seed, **cell(data, NAMES[name], steps, seed, output))
    grid.report("Made by `examples/encoder_decoder_sizes.py` of hf_xent: widths of inner layers. NOT translation.")
    row = lambda name, seed: [grid.results[name][seed][key] for key in ("encoder", "decoder", "loss")]  # noqa: E731
    study = Study("Forecasts", METRICS, CONTROLS[1], output, seeds, settings)
    for arm, seed in study.runs([LAW, *CONTROLS]):
        known = np.array([row(name, seed) for name, sizes in NAMES.items() if sizes not in HELD]).T
        held = np.array([row(name, seed) for sizes in HELD for name in NAMES if NAMES[name] == sizes]).T
        errors = 100 * np.abs(forecast(arm, known, held) / held[2] - 1)
        study.record(arm, seed, **dict(zip(METRICS, (errors.mean(), *errors), strict=True)))
    encoder, decoder, loss = np.array([row(name, seed) for name in NAMES for seed in range(seeds)]).T
    fit = laws.fit("encoder_decoder", sizes := {"encoder": encoder, "decoder": decoder}, loss, bootstrap=200)
    law_figures.draw_columns(fit, sizes, loss, output / "grid.png")
    fit.save(output / "fit.json")
    shares = [pe / (pe + pd) for _, pe, pd, _ in fit.draws]
    text = f"{fit.law.describe()}; best share of the encoder {fit.law.encoder_share:.3f}, 95 % from "
    text += " to ".join(f"{edge:.3f}" for edge in np.quantile(shares, (0.025, 0.975)))
    return study.report(f"Made by `examples/encoder_decoder_sizes.py` of hf_xent. NOT translation. All losses: {text}.")


if __name__ == "__main__":
    typer.run(main)
