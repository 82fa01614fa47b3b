"""What encoder_decoder_sizes.py does with its losses: forecasts of models held out, and the law of all of them.

Models are the rows [encoder, decoder, loss], [models, 3]: parameters of both halves, and nats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from hf_xent import laws
from hf_xent.experiments import law_figures

LAW, SUM, LARGEST, MEAN = "encoder-decoder law", "power law of the sum", "the largest fitted model", "the mean"
DRAWS = 200  # of the bootstrap


def forecast(arm: str, known: np.ndarray, held: np.ndarray) -> Any:
    """The losses of models held out, from those that are known; nan if a fit is refused."""
    encoder, decoder, loss = known.T
    if arm in (LARGEST, MEAN):
        return loss[(encoder + decoder).argmax()] if arm == LARGEST else loss.mean()
    try:
        if arm == SUM:
            return laws.fit("power", {"x": encoder + decoder}, loss).predict(x=held[:, 0] + held[:, 1]).loss
        fit = laws.fit("encoder_decoder", {"encoder": encoder, "decoder": decoder}, loss)
        return fit.predict(encoder=held[:, 0], decoder=held[:, 1]).loss
    except ValueError as error:
        print(f"{arm}: {error}")
        return np.nan


def slopes(models: np.ndarray) -> str:
    """The slopes of the logarithm of the loss in those of both sizes, with 95 % intervals of least squares.

    They may have any sign; exponents of the law are at least 0. Added after the fits of a first run were refused.
    """
    x = np.column_stack([np.ones(len(models)), np.log(models[:, :2])])
    y = np.log(models[:, 2])
    found = np.linalg.lstsq(x, y, rcond=None)[0]
    noise = np.square(y - x @ found).sum() / (len(y) - 3)
    half = student.ppf(0.975, len(y) - 3) * np.sqrt(noise * np.diag(np.linalg.inv(x.T @ x)))
    return f"Slopes: encoder {found[1]:+.3f} ± {half[1]:.3f}, decoder {found[2]:+.3f} ± {half[2]:.3f}."


def summary(models: np.ndarray, output: Path) -> str:
    """The law of all models and the best share of the encoder in a sentence; fit.json and grid.png have more."""
    encoder, decoder, loss = models.T
    columns = {"encoder": encoder, "decoder": decoder}
    try:
        fit = laws.fit("encoder_decoder", columns, loss, bootstrap=DRAWS)
    except ValueError as error:
        return f"No law of all losses: {error}. {slopes(models)}"
    law_figures.draw_columns(fit, columns, loss, fit.save(output / "fit.json").with_name("grid.png"))
    low, high = fit.interval_from(lambda law: law.encoder_share)
    share = f"best share of the encoder {fit.law.encoder_share:.3f}, 95 % from {low:.3f} to {high:.3f}"
    ranges = "; ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in fit.intervals.items())
    return f"All losses: {fit.law.describe()} (95 %: {ranges}); {share}. {slopes(models)}"
