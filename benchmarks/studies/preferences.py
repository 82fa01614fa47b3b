"""Noisy preferences of known strength: SPCE, PSO and SPO against DPO and cDPO; and OSP, which is in osp.py.

The task is that of naming.py. Arms that see one vote for each pair: DPO, cDPO, SPO and its control. Arms that see
three: DPO on the majority, SPCE and PSO on the share. SPCE and PSO with the known probability know more than any
annotator says, and are upper bounds. Every arm trains for the same number of epochs; metrics with "stopped" before them
are those of the epoch with the smallest log loss of validation votes, the others those of the last.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from transformers import TrainerCallback

from benchmarks.studies import naming, naming_models, osp
from benchmarks.studies.naming_models import Examiner
from benchmarks.studies.plan import Job, Plan
from hf_xent import SPCEConfig, SPCETrainer, SPOConfig, SPOTrainer
from hf_xent.experiments.claims import Claim

PAIRS, EPOCHS, BATCH, BETA = 600, 8, 16, 1.0
HELD_OUT, VALIDATION, SAMPLES = 1000, 400, 128

LABELS = {
    "vote": lambda row: row["votes"][0],
    "majority": lambda row: round(mean(row["votes"])),
    "share": lambda row: mean(row["votes"]),
    "known": lambda row: row["p"],
}
"""Name -> what an arm believes of a pair, the probability that its first answer is better."""


@dataclass(frozen=True)
class Arm:
    """What an arm is told, how it trains, and at which learning rate."""

    labels: str
    rate: float
    options: dict[str, Any] = field(default_factory=dict)


SPO = {"gamma_w": 0.2, "gamma_l": 0.2}
ARMS = {
    "DPO": Arm("vote", 1e-4),
    "cDPO": Arm("vote", 1e-4),
    "SPO": Arm("vote", 1e-4, SPO),
    "SPO, random phrases": Arm("vote", 1e-4, SPO | {"key_content": "random"}),
    "DPO, majority of 3": Arm("majority", 1e-4),
    "SPCE, share of 3": Arm("share", 1e-4),
    "PSO, share of 3": Arm("share", 1e-4, {"method": "pso"}),
    "SPCE, known p": Arm("known", 1e-4),
    "PSO, known p": Arm("known", 1e-4, {"method": "pso"}),
}
UNTRAINED = "untrained"


class Epochs(TrainerCallback):
    """Keeps the weights of the epoch with the smallest validation loss."""

    def __init__(self, examiner: Examiner):
        self.examiner = examiner
        self.losses: list[float] = []
        self.best: dict[str, Any] = {}

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Validates."""
        model.eval()
        self.losses.append(self.examiner.validated(model))
        if self.losses[-1] == min(self.losses):
            self.best = copy.deepcopy(model.state_dict())
        model.train()


def fitted(name: str, seed: int, job: Job, rate: float | None = None) -> tuple[Any, Epochs]:
    """The trainer of an arm after its training, and what it kept."""
    arm = ARMS[name]
    count = job.scaled(PAIRS, tiny=24)
    rows = naming.pairs(count, f"train {seed}", 0, 1, 2)
    data = naming.labelled(rows, [LABELS[arm.labels](row) for row in rows])
    options = dict(arm.options)
    if name == "cDPO":  # the expected share of wrong labels, which a user has to estimate
        options["label_smoothing"] = mean(min(row["p"], 1 - row["p"]) for row in rows)
    model = naming_models.base(job, "writer")
    held_out = naming.pairs(job.scaled(HELD_OUT, tiny=20), f"test {seed}", 3)
    validation = naming.pairs(job.scaled(VALIDATION, tiny=20), f"validation {seed}", 0, 1, 2)
    samples = job.scaled(SAMPLES, tiny=2)
    epochs = Epochs(Examiner(model, held_out, validation, BETA, samples, seed))
    trainer_class, config = (SPOTrainer, SPOConfig) if "gamma_w" in options else (SPCETrainer, SPCEConfig)
    arguments = config(
        output_dir=str(job.work / "run"), num_train_epochs=2 if job.tiny else EPOCHS, seed=seed, beta=BETA,
        per_device_train_batch_size=BATCH, learning_rate=rate or arm.rate, lr_scheduler_type="constant_with_warmup",
        warmup_steps=10, logging_steps=10, save_strategy="no", report_to="none", use_cpu=job.device == "cpu",
        bf16=False, precompute_ref_log_probs=True, precompute_ref_batch_size=64, gradient_checkpointing=False,
        disable_tqdm=True, **options,
    )  # fmt: skip
    parts = {"train_dataset": data.remove_columns("known"), "processing_class": naming.tokenizer()}
    trainer = trainer_class(model, args=arguments, callbacks=[epochs], **parts)
    trainer.train()
    trainer.model.eval()
    return trainer, epochs


def run(name: str, seed: int, job: Job) -> dict[str, float]:
    """One arm under one seed."""
    if name == UNTRAINED:
        model = naming_models.base(job, "writer")
        return Examiner(model, [], [], BETA, job.scaled(SAMPLES, tiny=2), seed).answered(model)
    trainer, epochs = fitted(name, seed, job)
    model, examiner = trainer.model, epochs.examiner
    metrics = examiner.judged(model) | examiner.answered(model) | {"validation": epochs.losses[-1]}
    model.load_state_dict(epochs.best)
    stopped = examiner.judged(model) | examiner.answered(model) | {"epoch": 1 + epochs.losses.index(min(epochs.losses))}
    return metrics | {f"stopped {name}": value for name, value in stopped.items()}


METRICS = (
    "calibration error", "squared error", "accuracy", "utility", "wins", "KL", "tokens", "stopped calibration error",
    "stopped accuracy", "stopped utility", "stopped KL", "stopped epoch",
)  # fmt: skip
CLAIMS = (
    Claim("SPCE, share of 3", "calibration error", 0.02, higher=False, against="DPO, majority of 3"),
    Claim("SPCE, share of 3", "stopped utility", 0.15, against="DPO, majority of 3"),
    Claim("PSO, share of 3", "stopped utility", 0.15, against="DPO, majority of 3"),
    Claim("SPO", "stopped accuracy", 0.02, against="SPO, random phrases"),
)
SETTINGS = {
    "pairs": PAIRS, "epochs": EPOCHS, "pairs a step": BATCH, "beta": BETA, "held-out pairs": HELD_OUT,
    "rates": {name: arm.rate for name, arm in ARMS.items()},
}  # fmt: skip
PLANS = (
    Plan("preferences", (UNTRAINED, *ARMS), "DPO", METRICS, CLAIMS, 8, run, SETTINGS),
    osp.PLAN,
)
