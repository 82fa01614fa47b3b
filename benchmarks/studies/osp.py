"""Self-judged rounds (OSP) on the task of naming.py, with judges of measured accuracy.

The policy has learnt both to answer and to say whether an answer is better than others, the latter on other prompts (as
in SELF-JUDGE, arXiv:2402.11253); a reward head has learnt from votes on the same other prompts. The verdicts of a judge
are used as probabilities, as OSP does, and as hard labels, which is iterated DPO. The program's probabilities are the
known ones. `pairs right` is how often the better answer of a pair is the chosen one, where the two differ, and
`strength error` the mean squared distance of a pair's probability from the known one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from transformers import GPT2ForSequenceClassification, set_seed
from trl import RewardConfig, RewardTrainer

import hf_xent
from benchmarks.studies import naming, naming_models
from benchmarks.studies.naming_models import Examiner
from benchmarks.studies.plan import WORK, Job, Plan, tuning
from hf_xent.data import Format
from hf_xent.experiments.claims import Claim
from hf_xent.generation.judging import ModelJudge
from hf_xent.models.padding import padded

PROMPTS, ROUNDS, K, BATCH, BETA, SAMPLES = 200, 4, 4, 16, 1.0, 128
VOTES, REWARD_EPOCHS = 1500, 4
QUESTION = Format(naming.QUESTION, naming.VERDICTS)


class HardLabels(hf_xent.OSPTrainer):
    """Iterated DPO: the judge's preferred answer is chosen for certain."""

    def judged_pairs(self, number: int) -> Dataset:
        """The pairs of a round, as they were judged."""
        return super().pairs(number)

    def pairs(self, number: int) -> Dataset:
        """The pairs of a round, with certain labels."""
        return super().pairs(number).map(lambda _: {"preference_prob": 1.0})


@dataclass(frozen=True)
class Arm:
    """A judge, whether its probabilities become hard labels, and the learning rate."""

    judge: str
    hard: bool
    rate: float


ARMS = {
    "self-judge": Arm("self", False, 3e-4),
    "self-judge, hard": Arm("self", True, 3e-5),
    "reward head": Arm("reward", False, 1e-4),
    "reward head, hard": Arm("reward", True, 1e-4),
    "program": Arm("program", False, 1e-3),
    "program, hard": Arm("program", True, 3e-4),
    "random judge": Arm("random", False, 1e-3),
}
UNTRAINED = "untrained"


def program(rows: Sequence[Any], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """The known probabilities."""
    return [naming.probability(row["prompt"], a, b) for row, a, b in zip(rows, first, second, strict=True)]


def chance(rows: Sequence[Any], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """Random probabilities, which depend on the two texts alone."""
    return [random.Random(f"{a} / {b}").random() for a, b in zip(first, second, strict=True)]


@dataclass
class SelfJudge(ModelJudge):
    """Grades answers one by one: sigmoid of the difference of the logits of "better" against "worse" after each."""

    format: Format = QUESTION
    batch_size: int = 256

    def __call__(self, rows: Sequence[Any], first: Sequence[str], second: Sequence[str]) -> torch.Tensor:
        """The probability that the first is better."""
        grades = [super(SelfJudge, self).__call__(rows, side, side).double().logit() for side in (first, second)]
        return (grades[0] - grades[1]).sigmoid()


@dataclass
class RewardJudge:
    """sigmoid of the difference of two rewards."""

    model: Any
    tokenizer: Any

    @torch.no_grad()
    def rewards(self, rows: Sequence[Any], answers: Sequence[str]) -> torch.Tensor:
        """The rewards [n]."""
        texts = [f"{row['prompt']} {text} {naming.END}" for row, text in zip(rows, answers, strict=True)]
        found = []
        for start in range(0, len(texts), 256):
            ids, mask = padded(self.tokenizer(texts[start : start + 256])["input_ids"], device=self.model.device)
            found.append(self.model(input_ids=ids, attention_mask=mask).logits[:, 0].double().cpu())
        return torch.cat(found)

    def __call__(self, rows: Sequence[Any], first: Sequence[str], second: Sequence[str]) -> torch.Tensor:
        """The probability that the first is better."""
        return (self.rewards(rows, first) - self.rewards(rows, second)).sigmoid()


def reward_judge(job: Job, seed: int) -> RewardJudge:
    """A reward head and its body, tuned on one vote for each of some pairs about other prompts; kept for each seed."""
    folder, tokenizer = job.work / f"reward-{seed}-{job.device}-{job.budget:g}", naming.tokenizer()
    if not (folder / "config.json").exists():
        rows = naming.pairs(job.scaled(VOTES, tiny=8), f"votes {seed}", 0, 1)
        data = naming.labelled(rows, [row["votes"][0] for row in rows])
        start = job.work / f"base-judge-{job.device}-{job.budget:g}"
        set_seed(seed)
        model = GPT2ForSequenceClassification.from_pretrained(start, num_labels=1)
        arguments = RewardConfig(
            output_dir=str(folder / "run"), num_train_epochs=REWARD_EPOCHS, per_device_train_batch_size=32, seed=seed,
            learning_rate=3e-4, lr_scheduler_type="linear", save_strategy="no", report_to="none", bf16=False,
            use_cpu=job.device == "cpu", gradient_checkpointing=False, disable_tqdm=True, logging_steps=10,
        )  # fmt: skip
        columns = ["prompt", "chosen", "rejected"]
        parts = {"train_dataset": data.select_columns(columns), "processing_class": tokenizer}
        RewardTrainer(model, args=arguments, **parts).train()
        model.save_pretrained(folder)
    model = GPT2ForSequenceClassification.from_pretrained(folder).to(job.device)
    return RewardJudge(model.eval(), tokenizer)


def judge_of(name: str, job: Job, seed: int) -> Callable[..., Any]:
    """A judge by its name; the model of the self-judge is the trainer's policy."""
    if name == "self":
        return SelfJudge()
    return reward_judge(job, seed) if name == "reward" else {"program": program, "random": chance}[name]


def described(pairs: Dataset) -> dict[str, float]:
    """Of the pairs of a round: how often they are right, their strength, and its error."""
    known = [naming.probability(row["prompt"], row["chosen"], row["rejected"]) for row in pairs]
    right = [p > 0.5 for p in known if p != 0.5]
    strength = pairs["preference_prob"][:]
    errors = [(a - b) ** 2 for a, b in zip(known, strength, strict=True)]
    return {"pairs right": mean(right or [0.5]), "strength": mean(strength), "strength error": mean(errors)}


def run(name: str, seed: int, job: Job, rate: float | None = None) -> dict[str, float]:
    """One arm under one seed."""
    policy = naming_models.base(job, "judge")
    examiner = Examiner(policy, None, None, BETA, job.scaled(SAMPLES, tiny=2), seed)
    if name == UNTRAINED:
        return examiner.answered(policy)
    arm, rounds = ARMS[name], 2 if job.tiny else ROUNDS
    rng = random.Random(f"prompts {seed}")
    rows = Dataset.from_dict({"prompt": rng.choices(naming.prompts(2), k=job.scaled(PROMPTS, tiny=4))})
    arguments = hf_xent.OSPConfig(
        output_dir=str(job.work / "rounds" / name.replace(", ", "-").replace(" ", "-")), num_train_epochs=rounds,
        num_generations=K, max_new_tokens=naming.LONGEST, generation_batch_size=400, pairs="all", beta=BETA, seed=seed,
        per_device_train_batch_size=BATCH, learning_rate=rate or arm.rate, lr_scheduler_type="constant_with_warmup",
        warmup_steps=10, save_strategy="no", logging_steps=10, report_to="none", bf16=False, max_length=128,
        gradient_checkpointing=False, use_cpu=job.device == "cpu", disable_tqdm=True,
    )  # fmt: skip
    trainer_class = HardLabels if arm.hard else hf_xent.OSPTrainer
    parts = {"train_dataset": rows, "processing_class": naming.tokenizer(), "judge": judge_of(arm.judge, job, seed)}
    trainer = trainer_class(policy, args=arguments, **parts)
    trainer.train()
    first, last = (
        described(super(HardLabels, trainer).pairs(r) if arm.hard else trainer.pairs(r)) for r in (0, rounds - 1)
    )
    metrics = examiner.answered(trainer.model.eval()) | first
    return metrics | {f"last {name}": value for name, value in last.items()}


METRICS = (
    "utility", "wins", "KL", "tokens", "pairs right", "strength", "strength error", "last pairs right",
    "last strength error",
)  # fmt: skip
CLAIMS = (
    Claim("self-judge", "utility", 0.3),
    Claim("self-judge", "utility", 0.3, against="random judge"),
    Claim("self-judge", "utility", 0.2, against="self-judge, hard"),
    Claim("reward head", "utility", 0.2, against="reward head, hard"),
)
SETTINGS = {"prompts": PROMPTS, "rounds": ROUNDS, "samples a prompt": K, "pairs a step": BATCH, "beta": BETA}
RATES, TUNING_SEEDS = (3e-5, 1e-4, 3e-4, 1e-3), (100, 101)


def rates(job: Job) -> dict[str, float]:
    """Arm -> the learning rate with the best utility, by the program, as a mean over the seeds of the pilot."""
    study, best = tuning("osp", job, SETTINGS), {}
    for arm in ARMS:
        names = [f"{arm}, seed {seed}" for seed in TUNING_SEEDS]
        for name, seed in zip(names, TUNING_SEEDS, strict=True):
            study.tuned(name, RATES, lambda rate, arm=arm, seed=seed: run(arm, seed, job, rate)["utility"])
        best[arm] = max(RATES, key=lambda rate, names=names: mean(study.tried[name][rate] for name in names))
    return best


PLAN = Plan(
    "osp", (UNTRAINED, *ARMS), UNTRAINED, METRICS, CLAIMS, 5, run,
    SETTINGS | {"rates": {name: arm.rate for name, arm in ARMS.items()}},
)  # fmt: skip

if __name__ == "__main__":
    print(rates(Job(WORK / "preferences")))
