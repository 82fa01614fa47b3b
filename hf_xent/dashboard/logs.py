"""Curves and measures of a trainer's log: `log_history` of transformers, and the logs of `results.json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .contents import Chart, Curve, Table, is_number, shown

FIRST = ("loss", "perplexity", "mean_token_accuracy", "accuracy", "entropy", "learning_rate", "grad_norm")
"""The measures that come first on a page, in this order; the others follow as they are logged."""
Y = {"entropy": "nats", "seconds": "seconds a step", "memory": "MiB"}
"""Measure -> the label of its axis, where the name does not say it."""
UNSHOWN = ("step", "epoch", "total_flos", "train_loss", "num_tokens", "num_input_tokens_seen")
TIMES = ("runtime", "per_second", "preparation_time", "compilation_time")
EVALUATION = "evaluation"

Series = dict[tuple[str, str, str], list[tuple[float, float | None]]]
"""(measure, run, note) -> (step, value)."""


def series(history: Iterable[Mapping[str, Any]], run: str) -> Series:
    """The numbers of a log by measure; those of evaluations have the note 'evaluation', and the name of the data set.

    Args:
        history: Entries as `trainer.state.log_history` has them; an entry without a step counts as one more step.
        run: The name of the run.
    """
    entries = list(history)
    sets = [key[5:-8] for entry in entries for key in entry if key.startswith("eval_") and key.endswith("_runtime")]
    found: Series = {}
    for place, entry in enumerate(entries, 1):
        for key, value in entry.items():
            if key in UNSHOWN or key.endswith(TIMES) or not isinstance(value, (int, float)) or isinstance(value, bool):
                continue
            measure, note = _measure(key, sets)
            step = entry.get("step", place)
            found.setdefault((measure, run, note), []).append((step, value if is_number(value) else None))
    return found


def _measure(key: str, sets: list[str]) -> tuple[str, str]:
    """The measure of a key of the log, and the note of its curve."""
    for name in sorted(set(sets), key=len, reverse=True):
        if key.startswith(f"eval_{name}_"):
            return key.removeprefix(f"eval_{name}_"), f"{EVALUATION}, {name}"
    if key.startswith("eval_"):
        return key.removeprefix("eval_"), EVALUATION
    return key, ""


def charts(found: Series) -> list[Chart]:
    """One chart for each measure of which a curve has two points."""
    measures = list(dict.fromkeys(measure for measure, _, _ in found))
    measures.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    made = []
    for measure in measures:
        curves = [
            Curve(run, [x for x, _ in points], [y for _, y in points], note)
            for (name, run, note), points in found.items()
            if name == measure
        ]
        if any(len(curve.x) > 1 for curve in curves):
            made.append(Chart(measure.replace("_", " "), curves, y=Y.get(measure, "")))
    return made


def evaluations(found: Series) -> Table | None:
    """The first and the last value of each measure of the evaluations; None without evaluations."""
    rows = []
    for (measure, run, note), points in found.items():
        if note.startswith(EVALUATION):
            name = measure.replace("_", " ") + note.removeprefix(EVALUATION)
            first = shown(points[0][1]) if len(points) > 1 else ""
            rows.append([run, name, first, shown(points[-1][1])])
    kept = [i for i in range(4) if i != 0 or len({row[0] for row in rows}) > 1]  # the run, if there are several
    kept = [i for i in kept if i != 2 or any(row[2] for row in rows)]  # the first, if there are several evaluations
    head = ["run", "evaluation", "first", "last"]
    return Table("Evaluations", [head[i] for i in kept], [[row[i] for i in kept] for row in rows]) if rows else None
