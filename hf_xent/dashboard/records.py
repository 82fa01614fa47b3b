"""Folders of searches, studies, attacks and detection: what their JSON files have, as tables and charts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import inf
from statistics import mean, stdev
from typing import Any

from .contents import ATTACKS, DETECTION, SEARCH, SEEDS, Chart, Curve, Folder, Table, is_number, shown

MOST = 50
"""The most rows of a table of trials."""
MEASURES = 8
"""The most measures of a study that are drawn; its table has all."""
RATES = {
    "auroc": "AUROC",
    "auroc_low": "95 % from",
    "auroc_high": "to",
    "tpr@1%fpr": "TPR at 1 % FPR",
    "tpr@5%fpr": "TPR at 5 % FPR",
    "texts": "texts",
}
"""Metric of a score -> the head of its column."""


def read_trials(folder: Folder, stored: Mapping[str, Any]) -> None:
    """Adds a search, `trials.json`: the score of every trial, the best so far, and the score by parameter."""
    folder.kinds.append("search")
    settings = stored.get("settings", {})
    file = folder.path / "search.json"  # what `hf-xent search` adds: all options of the run
    folder.set(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else settings)
    sign = 1 if settings.get("direction", "minimize") == "minimize" else -1
    trials = sorted(stored["trials"], key=lambda t: sign * t["score"] if is_number(t["score"]) else inf)
    names = list(dict.fromkeys(name for trial in trials for name in trial["parameters"]))
    rows = [
        [
            str(t["number"]),
            shown(t["score"]) or f"failed: {t.get('error')}",
            *(shown(t["parameters"].get(n)) for n in names),
        ]
        for t in trials[:MOST]
    ]
    note = f"The best {MOST} of {len(trials)} trials." if len(trials) > MOST else ""
    folder.tables.append(Table("Trials, the best first", ["trial", "score", *names], rows, SEARCH, note))
    done = sorted((t for t in trials if is_number(t["score"])), key=lambda t: t["number"])
    if not done:
        return
    numbers, scores = [t["number"] for t in done], [t["score"] for t in done]
    best = [sign * min(sign * score for score in scores[: i + 1]) for i in range(len(scores))]
    curves = [Curve("trial", numbers, scores, joined=False), Curve("best so far", numbers, [*best])]
    folder.charts.append(Chart("score of every trial", curves, "trial", "score", SEARCH))
    for name in names:
        kept = [t for t in done if is_number(t["parameters"].get(name))]
        x = [t["parameters"][name] for t in kept]
        if len({*x}) > 1:
            points = Curve("trial", x, [t["score"] for t in kept], joined=False)
            wide = min(x) > 0 and max(x) / min(x) > 30
            folder.charts.append(Chart(f"score by {name}", [points], name, "score", SEARCH, log_x=wide))


def read_study(folder: Folder, stored: Mapping[str, Any]) -> None:
    """Adds a study, `results.json` of `hf_xent.experiments.study`: each measure's mean over seeds, and every seed."""
    folder.kinds.append("study")
    folder.set(stored.get("settings", {}))
    results = stored["results"]
    names = list(dict.fromkeys(name for seeds in results.values() for row in seeds.values() for name in row))

    def values(arm: str, name: str) -> list[float]:
        return [row[name] for row in results[arm].values() if is_number(row.get(name))]

    rows = [[arm, str(len(results[arm])), *(_spread(values(arm, name)) for name in names)] for arm in results]
    note = "Mean (standard deviation) over seeds."
    folder.tables.append(Table("Arms", ["", "seeds", *names], rows, SEEDS, note))
    for name in names[:MEASURES]:
        found = {arm: values(arm, name) for arm in results}
        arms = tuple(arm for arm, numbers in found.items() if numbers)
        if len(arms) < 2:
            continue
        seeds = [(x, float(i)) for i, arm in enumerate(arms) for x in found[arm]]
        curves = [
            Curve("seed", [x for x, _ in seeds], [y for _, y in seeds], joined=False),
            Curve("mean", [mean(found[arm]) for arm in arms], [float(i) for i in range(len(arms))], joined=False),
        ]
        folder.charts.append(Chart(name, curves, x=name, section=SEEDS, rows=arms))


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.4g}" + (f" ({stdev(values):.2g})" if len(values) > 1 else "")


def read_attacks(folder: Folder, stored: Mapping[str, Any]) -> None:
    """Adds `results.json` of `hf-xent attack`: accuracy before and under every attack, by class, and its cost."""
    folder.kinds.append("attack")
    folder.set(stored.get("run", {}))
    columns = {"clean": stored["clean"], **stored["attacks"]}
    rows = [
        ["accuracy", *(f"{found['accuracy']:.1%}" for found in columns.values())],
        ["95 % interval", *(f"{found['low']:.1%} to {found['high']:.1%}" for found in columns.values())],
    ]
    for name in stored.get("rows_by_class", {}):
        rows.append([f"of {name}", *(f"{found['by_class'][name]:.1%}" for found in columns.values())])
    for key, title in (("passes_per_row", "passes a row"), ("seconds", "seconds")):
        rows.append([title, *(shown(found.get(key)) for found in columns.values())])
    note = f"{stored['rows']} rows, epsilon {shown(stored['epsilon'])}, at most {stored['steps']} steps."
    folder.tables.append(Table("Accuracy", ["", *columns], rows, ATTACKS, note))
    if stored.get("masking"):
        signs = [[name.replace("_", " "), shown(value)] for name, value in stored["masking"].items()]
        folder.tables.append(Table("Signs of gradient masking", ["", "value"], signs, ATTACKS))


def read_detection(folder: Folder, stored: Mapping[str, Any]) -> None:
    """Adds a report of `hf-xent detect`: means and metrics of every score, and the ROC curves."""
    folder.kinds.append("detection")
    folder.set(stored.get("run", {}))
    summary = stored["summary"]
    metrics, means, directions = (summary.get(name) or {} for name in ("metrics", "means", "higher_is"))
    names = [name for name in RATES if any(name in row for row in metrics.values())]
    rows = [
        [score, shown(means.get(score)), directions.get(score, ""), *(_rate(metrics.get(score, {}), n) for n in names)]
        for score in dict.fromkeys((*means, *metrics))
    ]
    note = f"{summary['texts']} texts; {summary['unscored']} without a score"
    note += f", {summary['unlabeled']} without a label." if "unlabeled" in summary else "."
    if "blind" in metrics:
        note += (
            " The baseline 'blind' reads words alone and has not seen the model: where it is above chance, the classes"
            " differ in their topics, and no score is evidence of membership."
        )
    head = ["score", "mean", "higher is", *(RATES[name] for name in names)]
    folder.tables.append(Table(f"Scores of {summary['task']}", head, rows, DETECTION, note))
    if roc := stored.get("roc"):
        folder.charts.append(roc_chart(roc, metrics))


def _rate(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    return "" if value is None else str(value) if name == "texts" else f"{value:.3f}"


def roc_chart(roc: Mapping[str, Mapping[str, list[float]]], metrics: Mapping[str, Mapping[str, float]]) -> Chart:
    """The ROC curve of each score over a logarithmic axis, since detectors are compared at low false positive rates."""
    rates = [rate for curve in roc.values() for rate in curve["fpr"] if rate > 0]
    least = min(rates, default=0.01) / 2
    curves = []
    for score, curve in roc.items():
        name = f"{score} ({metrics[score]['auroc']:.3f})" if score in metrics else score
        curves.append(Curve(name, [max(rate, least) for rate in curve["fpr"]], [*curve["tpr"]]))
    grid = [least ** (1 - i / 40) for i in range(41)]
    curves.append(Curve("chance (0.500)", grid, [*grid], is_diagonal=True))
    return Chart("ROC (AUROC)", curves, "false positive rate", "true positive rate", DETECTION, log_x=True, unit=True)
