"""F2C: one answer in all formats, on four label sets; held-out formats, other label sets, and when a vote does harm.

    python -m benchmarks.studies.f2c                                # the formats that are kept, by the pilot's items
    python -m benchmarks.studies run f2c --part f2c-rates           # a learning rate for each arm, on the same items

docs/results/f2c.md says what is decided.
"""

from __future__ import annotations

import random
from functools import cache, partial
from typing import Annotated, Any

import numpy as np
import peft
import torch
import typer
from datasets import Dataset, disable_progress_bars
from transformers import set_seed

from benchmarks.studies.base import new_model, train_tokenizer
from benchmarks.studies.f2c_items import KEPT, SETS, TINY, Item
from benchmarks.studies.f2c_measures import (
    CALIBRATED,
    CONSTANT,
    UNTRAINED,
    VOTE,
    amplification,
    controlled,
    measured,
    votes,
)  # fmt: skip
from benchmarks.studies.f2c_when import SEEDS, WHEN, pooled
from benchmarks.studies.plan import PILOT_SEED, WORK, Job, Plan
from hf_xent import F2CConfig, F2CTrainer
from hf_xent.data import PromptFormats
from hf_xent.experiments.claims import Claim
from hf_xent.metrics.consistency import consistency
from hf_xent.models import loading
from hf_xent.trainers.f2c_items import ItemCollator

METHODS = {"F2C": "f2c", "CCE alone": "cce", "swarm": "swarm"}
ARMS = (UNTRAINED, *METHODS, CALIBRATED, VOTE, CONSTANT)
RATES, TUNED_ON = (3e-5, 1e-4, 3e-4), ("continents", "sentiment")
TRAINED_FORMATS, STEPS, ITEMS, HELD_OUT, ELSEWHERE, PILOT_SHARE = 6, 16, 8, 100, 20, 0.2
METRICS = (
    "agreement", "f1", "f1_spread", "accuracy", "largest_share", "amplification",
    "new_agreement", "new_f1", "task_agreement", "task_f1",
)  # fmt: skip
SETTINGS = {
    "model": "smollm2", "steps": STEPS, "items a step": ITEMS, "formats": TRAINED_FORMATS, "held out": HELD_OUT,
}  # fmt: skip


def load(job: Job) -> tuple[Any, Any]:
    """The model in bfloat16, and its tokenizer."""
    if job.tiny:
        tokenizer = train_tokenizer(["City 1 is in Africa, City 2 is near Asia, of, to and at"], 280)
        return new_model(tokenizer, n_layer=1, n_embd=32, n_head=2).to(job.device), tokenizer
    model, tokenizer = loading.load("smollm2")
    return model.to(torch.bfloat16).to(job.device), tokenizer


@cache
def items_of(name: str, job: Job) -> tuple[list[Item], list[Item]]:
    """The items of a label set: those of the pilot, and those of the study, which share no group."""
    items = (TINY if job.tiny else SETS[name]).shuffled(job.text)
    groups = list(dict.fromkeys(item["group"] for item in items))
    pilot = set(groups[: round(PILOT_SHARE * len(groups))])
    return [item for item in items if item["group"] in pilot], [item for item in items if item["group"] not in pilot]


def split(name: str, seed: int, job: Job) -> tuple[list[Item], list[Item]]:
    """The items of a seed, in training and held out; pilot seeds have items of the pilot for both."""
    pilot, study = items_of(name, job)
    items = pilot if seed >= PILOT_SEED else study
    groups = list(dict.fromkeys(item["group"] for item in items))
    random.Random(seed).shuffle(groups)
    order = {group: i for i, group in enumerate(groups)}
    items = sorted(items, key=lambda item: order[item["group"]])
    held_out = min(job.scaled(HELD_OUT, tiny=6), len(items) // 2)
    return items[held_out:], items[:held_out]


def drawn(name: str, seed: int, job: Job) -> tuple[PromptFormats, PromptFormats]:
    """The formats of a seed, in training and held out."""
    label_set = TINY if job.tiny else SETS[name]
    kept = list(label_set.formats) if job.tiny else [label_set.formats[i] for i in KEPT[name]]
    random.Random(1000 + seed).shuffle(kept)
    trained = 3 if job.tiny else TRAINED_FORMATS
    return PromptFormats(*kept[:trained]), PromptFormats(*kept[trained:])


def encoded(formats: PromptFormats, items: list[Item], tokenizer: Any) -> Dataset:
    """The rows of items in formats."""
    columns = list(dict.fromkeys(key for item in items for key in item))
    return formats.build(
        Dataset.from_list([{key: item[key] for key in columns} for item in items]), tokenizer, chat=False
    )


def scored(trainer: F2CTrainer, rows: Dataset) -> np.ndarray:
    """The scores [N, K, C] of a trainer's model."""
    collate, found = ItemCollator(0), []
    for start in range(0, len(rows), 8):
        batch = trainer._prepare_inputs(collate(list(rows.select(range(start, min(start + 8, len(rows)))))))
        with trainer.compute_loss_context_manager():
            found.append(trainer.scores(trainer.model, batch).float().cpu().numpy())
    return np.concatenate(found)


class Evaluation:
    """The scores of a model on a run's rows: training items, held-out ones in both kinds of formats, other sets."""

    def __init__(self, name: str, seed: int, job: Job, tokenizer: Any, elsewhere: bool = True):
        disable_progress_bars()
        trained, new = drawn(name, seed, job)
        train, test = split(name, seed, job)
        self.train = train[: job.scaled(STEPS * ITEMS, tiny=4)]
        self.parts = {"train": encoded(trained, self.train, tokenizer), "test": encoded(trained, test, tokenizer)}
        self.parts["new"] = encoded(new, test, tokenizer)
        for other in SETS if elsewhere else ():
            if other != name:
                items = split(other, seed, job)[1][: job.scaled(ELSEWHERE, tiny=4)]
                self.parts[f"task {other}"] = encoded(drawn(other, seed, job)[0], items, tokenizer)

    def scores(self, trainer: F2CTrainer, train: bool = False) -> dict[str, np.ndarray]:
        """Part -> scores."""
        return {part: scored(trainer, rows) for part, rows in self.parts.items() if train or part != "train"}


def trainer_of(arm: str, model: Any, seed: int, job: Job, rows: Dataset | None = None, rate: float = 0.0) -> F2CTrainer:
    """The trainer of an arm; that of the untrained model is never trained."""
    config = F2CConfig(
        output_dir=str(job.work / "run"), method=METHODS.get(arm, "f2c"), max_steps=job.scaled(STEPS, tiny=2),
        per_device_train_batch_size=2 if job.tiny else ITEMS, learning_rate=rate,
        lr_scheduler_type="cosine", warmup_steps=0, seed=seed, bf16=True, use_cpu=job.device == "cpu", logging_steps=2,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    if arm in METHODS:
        adapter = peft.LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", fan_in_fan_out=job.tiny
        )
        model = peft.get_peft_model(model, adapter)
    return F2CTrainer(model, config, train_dataset=rows)


def untrained(name: str, seed: int, job: Job, evaluation: Evaluation, model: Any) -> dict[str, np.ndarray]:
    """The untrained model's scores by part, training items included; kept in the folder of the job."""
    file = job.work / f"untrained-{name}-{seed}-{len(evaluation.parts)}.npz"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, **evaluation.scores(trainer_of(UNTRAINED, model, seed, job), train=True))
    with np.load(file) as stored:
        return dict(stored)


def run(arm: str, seed: int, job: Job, name: str, rate: float | None = None) -> dict[str, float]:
    """The metrics of an arm under a seed, which draws the items, the formats, and the order of training.

    With a learning rate the other label sets are left out; else it is that of `f2c-rates`.
    """
    set_seed(seed)
    model, tokenizer = load(job)
    evaluation = Evaluation(name, seed, job, tokenizer, elsewhere=rate is None)
    gold = {part: np.array(rows["gold"]) for part, rows in evaluation.parts.items()}
    before = untrained(name, seed, job, evaluation, model)
    choices = {part: table.shape[2] for part, table in before.items()}
    first = {part: table.argmax(-1) for part, table in before.items()}
    if arm in METHODS:
        rate = rate or (RATES[1] if job.tiny else best_rate(arm))
        trainer = trainer_of(arm, model, seed, job, evaluation.parts["train"], rate)
        trainer.train()
        logged = [row["consensus"] for row in trainer.state.log_history if "consensus" in row]
        predicted = {part: table.argmax(-1) for part, table in evaluation.scores(trainer).items()}
    else:
        predicted, logged = controlled(arm, before, first, gold, choices), []
    c, true = choices["test"], gold["test"]
    shares = [
        np.bincount(table.ravel(), minlength=c) / table.size for table in (first["test"], predicted["test"], true)
    ]
    vote = votes(first["train"], c)
    as_votes = np.repeat(vote[:, None], 2, 1)
    facts = {
        "amplification": amplification(*shares),
        "train_vote_accuracy": float((vote == gold["train"]).mean()),
        "train_vote_gain": consistency(as_votes, gold["train"], c).f1
        - consistency(first["train"], gold["train"], c).f1,
        "train_vote_share": float(np.bincount(vote, minlength=c).max() / len(vote)),
        "constant_accuracy": float(np.bincount(true).max() / len(true)),
    }
    return measured(predicted, gold, choices) | facts | ({"consensus": float(np.mean(logged))} if logged else {})


def tried(arm: str, seed: int, job: Job) -> dict[str, float]:
    """An arm under a learning rate, on items of the pilot: seeds 0, 1, ... are of the label sets in turn."""
    method, _, rate = arm.rpartition(" ")
    turn, which = divmod(seed, len(TUNED_ON))
    found = run(method, PILOT_SEED + turn, job, TUNED_ON[which], float(rate))
    return found | {"sum": found["agreement"] + found["f1"]}


def best_rate(arm: str) -> float:
    """The learning rate with the largest sum of agreement and F1.

    Raises:
        ValueError: The plan `f2c-rates` has not been run to its end.
    """
    study = TUNING.study()
    sums = {rate: study.values(f"{arm} {rate:g}", "sum") for rate in RATES}
    if any(len(found) < TUNING.seeds for found in sums.values()):
        raise ValueError(f"{study.file} lacks runs of {arm!r}: run the plan {TUNING.name} first")
    return max(RATES, key=lambda rate: sum(sums[rate].values()))


def plan_of(name: str) -> Plan:
    """The study of a label set."""
    claims = (
        Claim("F2C", "agreement", 0.05), Claim("F2C", "f1", 0.03),
        Claim("F2C", "f1", 0.03, against="swarm"),
    )  # fmt: skip
    return Plan(f"f2c-{name}", ARMS, UNTRAINED, METRICS, claims, SEEDS, partial(run, name=name), SETTINGS)


POOLED = Plan(
    "f2c-pooled", ARMS, UNTRAINED, METRICS,
    (
        Claim("F2C", "agreement", 0.05), Claim("F2C", "f1", 0.03), Claim("F2C", "new_f1", 0.03),
        Claim("F2C", "f1", 0.03, against="swarm"),
    ),
    SEEDS * len(SETS), partial(pooled, names=tuple(f"f2c-{name}" for name in SETS)), SETTINGS,
)  # fmt: skip
TUNING = Plan(
    "f2c-rates", ("untrained 0", *(f"{arm} {rate:g}" for arm in METHODS for rate in RATES)), "untrained 0",
    ("sum", "agreement", "f1", "largest_share"), (), len(TUNED_ON), tried, SETTINGS,
)  # fmt: skip
PLANS = (TUNING, *(plan_of(name) for name in SETS), POOLED, WHEN)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Label sets; all by default.")] = None, items: int = 60
) -> None:
    """Print the formats in which the untrained model is above chance on the pilot's items, by balanced accuracy."""
    job = Job(WORK / "f2c")
    model, tokenizer = load(job)
    trainer = trainer_of(UNTRAINED, model, 0, job)
    for name in names or SETS:
        chosen = items_of(name, job)[0][:items]
        gold = np.array([item["label"] for item in chosen])
        answers = scored(trainer, encoded(PromptFormats(*SETS[name].formats), chosen, tokenizer)).argmax(-1)
        labels = range(len(SETS[name].labels))
        recalls = np.array([[(column[gold == c] == c).mean() for c in labels] for column in answers.T]).mean(1)
        kept = [k for k, recall in enumerate(recalls) if recall >= 1 / len(labels) + 0.05]
        print(name, len(chosen), {k: round(float(recall), 3) for k, recall in enumerate(recalls)}, "kept", kept[:10])


if __name__ == "__main__":
    typer.run(main)
