"""What the study of F2C measures, from scores and predictions, and its arms that are not trained."""

from __future__ import annotations

import numpy as np

from hf_xent.metrics.consistency import consistency

UNTRAINED, CALIBRATED, VOTE, CONSTANT = "untrained", "calibrated", "vote", "constant predictor"


def measured(
    predicted: dict[str, np.ndarray], gold: dict[str, np.ndarray], choices: dict[str, int]
) -> dict[str, float]:
    """The metrics of predictions [N, K] by part."""
    reports = {part: consistency(table, gold[part], choices[part]) for part, table in predicted.items()}
    test, tasks = reports["test"], [report for part, report in reports.items() if part.startswith("task")]
    return {
        "agreement": test.agreement, "f1": test.f1, "f1_spread": test.f1_spread, "accuracy": test.accuracy,
        "vote_accuracy": test.vote_accuracy, "largest_share": max(test.marginals),
        "new_agreement": reports["new"].agreement, "new_f1": reports["new"].f1,
        **({"task_agreement": float(np.mean([report.agreement for report in tasks])),
            "task_f1": float(np.mean([report.f1 for report in tasks]))} if tasks else {}),
        **{f"share_{i}": share for i, share in enumerate(test.marginals)},
        **{f"{name}_{part.removeprefix('task ')}": getattr(report, name)
           for part, report in reports.items() if part.startswith("task") for name in ("agreement", "f1")},
    }  # fmt: skip


def amplification(before: np.ndarray, after: np.ndarray, gold: np.ndarray, choices: int) -> float:
    """How much of the untrained model's surplus of each label is added to it: 0 unchanged, 1 doubled, -1 removed.

    sum_c b_c d_c / sum_c b_c^2       b = share of answers - true share, untrained; d = change of the share
    """
    shares = (np.bincount(table.ravel(), minlength=choices) / table.size for table in (before, after, gold))
    first, then, true = shares
    surplus = first - true
    return float((surplus * (then - first)).sum() / max((surplus**2).sum(), 1e-12))


def votes(table: np.ndarray, choices: int) -> np.ndarray:
    """The most common prediction [N] of predictions [N, K]; ties go to the lower label."""
    return np.stack([(table == label).sum(1) for label in range(choices)], 1).argmax(1)


def controlled(
    arm: str, before: dict[str, np.ndarray], first: dict[str, np.ndarray], gold: dict[str, np.ndarray],
    choices: dict[str, int],
) -> dict[str, np.ndarray]:  # fmt: skip
    """The predictions of the arms that are not trained.

    'calibrated' subtracts from each score the mean score of its answer in its format, over items without labels (the
    training items where the formats are those of training, else the scored items themselves).
    """
    if arm == UNTRAINED:
        return {part: table for part, table in first.items() if part != "train"}
    found = {}
    for part, table in first.items():
        if part == "train":
            continue
        if arm == CALIBRATED:
            found[part] = (before[part] - before["train" if part == "test" else part].mean(0)).argmax(-1)
        elif arm == VOTE:
            found[part] = np.repeat(votes(table, choices[part])[:, None], table.shape[1], 1)
        else:
            found[part] = np.full_like(table, np.bincount(gold[part]).argmax())
    return found
