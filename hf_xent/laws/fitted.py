"""`Fit`, a law with the parameters that were found for it: intervals, forecasts with a band, errors, and its file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from ..system.files import replace_atomically
from .base import Law
from .curves import Data, Part, losses, parts_of


class Forecast(NamedTuple):
    """What a fitted law predicts, and the band of the bootstrap, [rows] each; without a bootstrap the band is nan."""

    loss: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Errors(NamedTuple):
    """Relative errors of a forecast in percent: their mean absolute value, the largest of one row, and the bias."""

    mape: float
    worst: float
    bias: float


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted law.

    The band and the intervals have the uncertainty that noise leaves in the parameters, and none of a law that is
    wrong: forecasts of a schedule or size that was held out, by `error_on`, are the test of that.
    """

    law: Law
    """The law with its parameters."""
    residuals: np.ndarray
    """log(loss) - log(prediction) of each row; differences for a law of scores."""
    objective: float
    """The sum of Huber losses that was minimized."""
    delta: float
    """Where the Huber loss turns from squares to absolute values."""
    seen: Mapping[str, tuple[float, float]]
    """The least and largest of what the law was fitted to."""
    draws: np.ndarray
    """Parameters of each bootstrap draw, [draws, parameters]; none without a bootstrap."""
    resampled: str = "nothing"
    """What the bootstrap resampled: 'points', 'blocks of curves' or 'nothing'."""
    units: int = 0
    """How many of these there are."""

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Parameter -> its 95 % interval by `interval_of`; empty without a bootstrap."""
        return self.interval_of(0.95)

    def interval_of(self, level: float) -> dict[str, tuple[float, float]]:
        """Parameter -> its interval at a level such as 0.95.

        Percentiles of the bootstrap, moved out as the quantiles of Student's t are from those of the normal, for the
        points (or blocks) that the parameters left over: plain percentiles are too narrow for few points.

        Source: Hesterberg 2015, What Teachers Should Know About the Bootstrap, arXiv:1411.5279, section 5.
        """
        if not len(self.draws):
            return {}
        low, high = np.quantile(self.draws, self._edges(level), axis=0)
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(self.law.parameters)}

    def interval_from(self, quantity: Callable[[Any], float], level: float = 0.95) -> tuple[float, float]:
        """The interval, as by `interval_of`, of what follows from the parameters, such as an encoder's best share.

        Args:
            quantity: A function of the law, such as `lambda law: law.encoder_share`.
            level: The share of the bootstrap that the interval holds.

        Returns:
            Its two ends; nan without a bootstrap.
        """
        if not len(self.draws):
            return float("nan"), float("nan")
        low, high = np.quantile([quantity(self._drawn(row)) for row in self.draws], self._edges(level))
        return float(low), float(high)

    def predict(self, data: Data | None = None, /, level: float = 0.95, **columns: Any) -> Forecast:
        """The loss and its band.

        Args:
            data: A curve, several, or a mapping of columns; or else
            level: The share of the bootstrap that the band holds.
            **columns: the columns of the law, such as `params` and `tokens`, or `lr` and `step`.

        Returns:
            Losses and band, one a row.

        Raises:
            ValueError: A column is missing, or the forecast is one on which the law is known to fail.
        """
        parts = parts_of(self.law, columns if data is None else data)
        for part in parts:
            self.law.check_within(self.seen, **part.columns)
        features = [self.law.features(**part.columns) for part in parts]
        for one in features:
            self.law.check_domain(one)
        loss = self.law.stacked(features)
        if not len(self.draws):
            return Forecast(loss, np.full_like(loss, np.nan), np.full_like(loss, np.nan))
        drawn = [self._drawn(row).stacked(features) for row in self.draws]
        low, high = np.quantile(drawn, self._edges(level), axis=0)
        return Forecast(loss, low, high)

    def _edges(self, level: float) -> list[float]:
        """The percentiles that bound an interval, as shares."""
        if not 0 < level < 1:
            raise ValueError(f"level is {level!r}: choose a number in (0, 1)")
        freedom = max(1, self.units - len(self.law.parameters))
        low = float(norm.cdf(student.ppf((1 - level) / 2, freedom)))
        return [low, 1 - low]

    def _drawn(self, row: np.ndarray) -> Law:
        return self.law.having(**dict(zip(self.law.parameters, map(float, row), strict=True)))

    def error_on(self, data: Data | None = None, y: Any = None, /, **columns: Any) -> Errors:
        """How far forecasts are from losses that the fit has not seen.

        Args:
            data: A curve or several, which have their losses; or a mapping of columns; or else
            y: the losses of the columns, and
            **columns: the columns of the law.

        Returns:
            Relative errors in percent, of all rows.

        Raises:
            ValueError: As `predict`, or the losses are missing.
        """
        parts: list[Part] = parts_of(self.law, columns if data is None else data, y)
        if any(part.y is None for part in parts):
            raise ValueError("y is missing: give the losses of the columns")
        truth = np.concatenate([losses(part.y) for part in parts])
        predicted = self.predict(columns if data is None else data).loss
        if predicted.shape != truth.shape:
            raise ValueError(f"y has {len(truth)} rows and the columns {len(predicted)}: give one loss a row")
        errors = 100 * (predicted / truth - 1)
        return Errors(float(np.abs(errors).mean()), float(np.abs(errors).max()), float(errors.mean()))

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the fit as JSON, and return the path. `Fit.read` reads it again."""
        written = [(field.name, getattr(self.law, field.name)) for field in fields(self.law)]  # type: ignore[arg-type]
        text = {
            "law": _name_of(self.law),
            "fields": {name: value for name, value in written if value == value},  # nan has no JSON, and is the default
            "parameters": list(self.law.parameters),
            "intervals": self.intervals,
            "objective": self.objective,
            "delta": self.delta,
            "seen": dict(self.seen),
            "resampled": self.resampled,
            "units": self.units,
            "residuals": self.residuals.tolist(),
            "draws": self.draws.tolist(),
        }
        return replace_atomically(Path(path), lambda draft: draft.write_text(json.dumps(text, indent=1), "utf-8"))

    @classmethod
    def read(cls, path: str | PathLike[str]) -> Fit:
        """A fit from its file.

        Raises:
            ValueError: The file is not one of `save`, or its law is not registered.
        """
        from . import LAWS

        try:
            text = json.loads(Path(path).read_text("utf-8"))
            law = LAWS.find(text["law"])(**text["fields"])
            return cls(
                law=law,
                residuals=np.array(text["residuals"]),
                objective=text["objective"],
                delta=text["delta"],
                seen={name: (low, high) for name, (low, high) in text["seen"].items()},
                draws=np.array(text["draws"]).reshape(-1, len(law.parameters)),
                resampled=text["resampled"],
                units=text["units"],
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not the file of a fit ({error!r}): write it with Fit.save") from error


def _name_of(law: Law) -> str:
    """The registry name of a law's class."""
    from . import LAWS

    for name in LAWS:
        if LAWS[name] is type(law):
            return name
    raise ValueError(f"law is {law!r}, which is not in LAWS: add it, LAWS['name'] = {type(law).__name__}, to save fits")
