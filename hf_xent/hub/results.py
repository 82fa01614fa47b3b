"""What a trainer measured, for its card: values, what each of them means, and entries of registered benchmarks.

`model-index` in the front matter takes any metric of any rows. An entry in `.eval_results/` is another claim: that the
value is the result of a task of a benchmark, which has a data set on the Hub and a task of that name. It is written
only if the user says which benchmark it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

NOT_RESULTS = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time", "num_tokens")
MEANINGS = {
    "loss": "the objective of the training, as Method has it; with DXO, binary cross-entropy",
    "perplexity": "exp of the mean cross-entropy of the labels, in nats per token",
    "entropy": "mean entropy of the predicted distributions, in nats per token",
    "mean_token_accuracy": "share of labels that are the most probable token",
    r"top\d+_accuracy": "share of labels among the so many most probable tokens",
    "calibration_error": "expected calibration error of the confidence in the most probable token, in 15 bins",
    "bits_per_byte": "cross-entropy of all labels in bits, by the bytes of their text",
    "divergence": "mean of the divergence from the teacher, or between speech and text",
    "ctc": "mean CTC loss of a row, in nats",
    "auroc": "area under the ROC curve; chance is 0.5",
    "ap": "average precision; chance is the share of positives",
    "pauc": "area under the ROC curve up to FPR `max_fpr`, scaled so that chance is 0.5 (McClish)",
    "tpauc": "area under the ROC curve at FPR <= `max_fpr` and TPR >= `min_tpr`, as a share of that rectangle",
    "tpr_1": "TPR at FPR <= 1 %, not interpolated",
    "tpr_5": "TPR at FPR <= 5 %, not interpolated",
    "accuracy": "share of rows with the right class; with formats, the mean over them",
    "adversarial_accuracy": "share of rows with the right class under the attack of the training",
    "drift": "squared change of the features of clean rows",
    "consensus": "share of items for which most formats give one answer",
    r"loss_\w+": "a part of the loss, before its weight",
    "agreement": "mean share of pairs of formats with the same answer; 1 for a model with one answer",
    "f1": "F1 of label 1, or the macro F1 of several labels; with formats, the mean over them",
    "f1_spread": "standard deviation of F1 over formats",
    "vote_accuracy": "accuracy of the most common answer of the formats",
    r"constant_\w+": "the control: a predictor with one answer, the best of them",
    r"predicted_\d+": "share of predictions with this label",
    "exact_match": "share of answers that equal a gold answer, both normalized as for SQuAD",
    r"rewards/\w+": "as TRL logs it",
}
"""Pattern of a metric's name -> its meaning, with the conventions on which its value depends."""


def latest(history: list[dict[str, Any]]) -> dict[str, float]:
    """The last evaluation, without the prefix and the times."""
    return _evaluation(next((entry for entry in reversed(history) if "eval_loss" in entry), {}))


def before(history: list[dict[str, Any]]) -> dict[str, float]:
    """The evaluation before the first step (`eval_on_start`), the control of the last one; empty if there is none."""
    return _evaluation(next((e for e in history if "eval_loss" in e and e.get("step") == 0), {}))


def rows(history: list[dict[str, Any]]) -> list[tuple[str, float, float | None, str]]:
    """Metric, value, value before training or None, and meaning, of the last evaluation."""
    first = before(history)
    return [(name, value, first.get(name), meaning(name)) for name, value in latest(history).items()]


def meaning(metric: str) -> str:
    """What a metric means; empty for one of the user's."""
    return next((text for pattern, text in MEANINGS.items() if re.fullmatch(pattern, metric)), "")


def write_benchmarks(folder: Path, benchmarks: Mapping[str, str], results: Mapping[str, float], notes: str) -> None:
    """Writes the entries of `.eval_results/` for metrics that are results of benchmarks.

    Args:
        folder: The folder to write into.
        benchmarks: Metric -> 'user/dataset:task'.
        results: Metric -> value.
        notes: A remark on the measurement.

    Raises:
        ValueError: For a metric that was not measured, or a benchmark of another form.
    """
    found: dict[str, dict[str, float]] = {}
    for metric, benchmark in benchmarks.items():
        parts = re.fullmatch(r"([\w.-]+/[\w.-]+):([\w.-]+)", benchmark)
        if metric not in results:
            raise ValueError(f"benchmarks names {metric!r}, which was not measured: choose among {', '.join(results)}")
        if parts is None:
            raise ValueError(f"benchmarks has {benchmark!r} for {metric}: give the form 'user/dataset:task'")
        found.setdefault(parts[1], {})[parts[2]] = results[metric]
    for dataset, tasks in found.items():
        eval_results(folder, dataset, tasks, notes)


def eval_results(folder: Path, dataset: str, results: Mapping[str, float], notes: str | None = None) -> None:
    """Writes `.eval_results/{dataset}.yaml` with an entry for each task of a benchmark; without results, no file.

    Args:
        folder: The folder to write into.
        dataset: The Hub id of the benchmark's data set.
        results: Task of the benchmark -> value.
        notes: A remark on the measurement.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump

    if not results:
        return
    date = datetime.now(UTC).date().isoformat()
    entries = [EvalResultEntry(dataset, task, value, date=date, notes=notes) for task, value in results.items()]
    path = folder / ".eval_results" / f"{dataset.replace('/', '--')}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")


def _evaluation(entry: dict[str, Any]) -> dict[str, float]:
    metrics = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
    return {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and k not in NOT_RESULTS}
