"""Membership in a pre-training from nothing: what DC-PDD and its kin find, by how often a text was read.

docs/results/dc_pdd.md says what is decided. The texts are made by corpora.py and chinese.py. An arm is a score; all
arms of a seed read the same model, which the first one trains.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from benchmarks.studies.membership_models import CAPS, DOSES, ONCE, PIECES, REPEATED, Corpus, Experiment
from benchmarks.studies.plan import PILOT_SEED, Job, Plan
from hf_xent import detection
from hf_xent.experiments.claims import Claim
from hf_xent.metrics import ranking

CORPORA = {
    "english": Corpus(
        "english",
        ("wiki", "brown", "anarchism", "debian-handbook", "debian-reference", "debian-policy", "developers-reference",
         "maint-guide"),
        characters=500, other=("pydoc",), spaced=True,
    ),
    "chinese": Corpus(
        "chinese", ("zh-news", "zh-reviews", "zh-manuals", "zh-poems"), characters=160, other=("zh-reference",),
        spaced=False,
    ),
}  # fmt: skip
SHIFT = {"english": ("brown", "wiki"), "chinese": ("zh-poems", "zh-news")}
"""Two sources of different times, the earlier one first: a benchmark with a shift, and without a single member."""
SCORES = {
    "Min-K%": "min_k", "loss": "loss", "zlib": "zlib", "lower case": "lowercase", "Min-K%++": "min_k_pp",
    "curvature": "fast_detect", **{f"DC-PDD a={a:g}": f"dc_pdd:a={a} kept" for a in CAPS},
}  # fmt: skip
CALIBRATED, ELSEWHERE, TABLE = "DC-PDD calibrated", "DC-PDD calibrated elsewhere", "DC-PDD calibrated, other table"
REFERENCE, BLIND = "reference", "blind"
REPEATS = DOSES[1:]


@cache
def experiment(language: str, job: Job) -> Experiment:
    """The experiment of a language, with the texts in memory."""
    return Experiment(CORPORA[language], job)


def cap(language: str, job: Job, table: str = "kept") -> str:
    """The column of DC-PDD with the cap that is best on the pilot's first model, by the mean AUROC over the doses."""
    made, best = experiment(language, job), {}
    values = made.scores(PILOT_SEED)
    for a in CAPS:
        found = measured(values[f"dc_pdd:a={a} kept"], made, PILOT_SEED, language)
        best[a] = np.mean([found[f"{dose}x"] for dose in DOSES])
    return f"dc_pdd:a={max(best, key=best.__getitem__)} {table}"


def values(arm: str, seed: int, language: str, job: Job) -> np.ndarray:
    """The score of an arm for every scored text, larger for a member."""
    made = experiment(language, job)
    if arm == BLIND:
        rows = made.pair(seed).scored()
        return detection.blind([piece for *_, piece in rows], [side == seed % 2 for side, *_ in rows])
    found = made.scores(seed)
    if arm == REFERENCE:  # oriented losses are negative
        return found["loss"] - made.scores(seed ^ 1)["loss"]
    other = next(name for name in CORPORA if name != language)
    chosen = {
        CALIBRATED: lambda: cap(language, job),
        ELSEWHERE: lambda: cap(other, job),
        TABLE: lambda: cap(language, job, "other"),
    }
    return found[chosen[arm]() if arm in chosen else SCORES[arm]]


def measured(found: np.ndarray, made: Experiment, seed: int, language: str) -> dict[str, float]:
    """The AUROC by dose and by position in the run, and of sets without a member."""
    rows, own = made.pair(seed).scored(), seed % 2
    side, dose = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    source = np.array([row[2] for row in rows])
    others = found[side != own]

    def auroc(members: np.ndarray, rest: np.ndarray = others) -> float:
        return ranking.auroc(np.r_[np.ones(len(members)), np.zeros(len(rest))], np.r_[members, rest])

    repeated = found[(side == own) & np.isin(dose, REPEATS)]
    labels = np.r_[np.ones(len(repeated)), np.zeros(len(others))]
    result = {f"{d}x": auroc(found[(side == own) & (dose == d)]) for d in DOSES}
    once, quarter = found[(side == own) & (dose == 1)], quarters(made, seed)
    first, last = auroc(once[quarter == 0]), auroc(once[quarter == 3])
    never = [found[(side != own) & keep] for keep in (dose > 1, dose == 1)]
    earlier, later = (found[(side != own) & (source == name)] for name in SHIFT[language])
    return {
        "0x": auroc(*never), **result, "repeated": auroc(repeated),
        "TPR@5%FPR": ranking.report(labels, np.r_[repeated, others])["tpr@5%fpr"],
        "first quarter": first, "last quarter": last, "recency": last - first, "shift": auroc(earlier, later),
    }  # fmt: skip


def quarters(made: Experiment, seed: int) -> np.ndarray:
    """The quarter of the run, 0 to 3, in which each text that is read once is read."""
    order = made.pair(seed).order(seed % 2, seed)
    found = np.zeros(sum(dose == 1 for dose, *_ in order), dtype=int)
    for position, (dose, index, _) in enumerate(order):
        if dose == 1:
            found[index] = 4 * position // len(order)
    return found


def run(language: str) -> Any:
    """The function of a plan."""

    def measure(arm: str, seed: int, job: Job) -> dict[str, float]:
        made = experiment(language, job)
        result = measured(values(arm, seed, language, job), made, seed, language)
        if arm == BLIND:  # its classifier learns what it is asked for
            rows = [row for row in made.pair(seed).scored() if row[0] != seed % 2 and row[2] in SHIFT[language]]
            labels = [row[2] == SHIFT[language][0] for row in rows]
            result["shift"] = ranking.auroc(labels, detection.blind([row[3] for row in rows], labels))
        return result

    return measure


def _plan(language: str) -> Plan:
    scores = [name for name in SCORES if name != "lower case" or CORPORA[language].spaced]
    metrics = ("0x", *(f"{dose}x" for dose in DOSES), "repeated", "TPR@5%FPR", "recency", "shift")
    claims = (
        Claim("loss", "1x", 0.05, against=BLIND),
        Claim(CALIBRATED, "1x", 0.02),
        Claim(CALIBRATED, "repeated", 0.03),
        Claim(CALIBRATED, "repeated", 0.03, against="DC-PDD a=0.01"),
    )
    return Plan(
        f"dc-pdd-{language}", (*scores, CALIBRATED, ELSEWHERE, TABLE, BLIND, REFERENCE), "Min-K%", metrics, claims,
        seeds=4, run=run(language), settings={"pieces": PIECES, "once": ONCE, "repeated": REPEATED},
    )  # fmt: skip


PLANS = (_plan("english"), _plan("chinese"))
