"""F2C: one answer in all formats, on four label sets; held-out formats, other label sets, and when a vote does harm.

    python -m benchmarks.studies.f2c formats                        # those that are kept, by the pilot's items
    python -m benchmarks.studies.f2c rates                          # the learning rate of each arm, by the same

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
from transformers import TrainerCallback, set_seed

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
from benchmarks.studies.plan import PILOT_SEED, WORK, Job, Plan, tuning
from hf_xent import F2CConfig, F2CTrainer
from hf_xent.data import PromptFormats
from hf_xent.experiments.claims import Claim
from hf_xent.metrics.consistency import consistency
from hf_xent.models import loading
from hf_xent.trainers.f2c_items import ItemCollator

METHODS = {"F2C": "f2c", "CCE alone": "cce", "swarm": "swarm"}
ARMS = (UNTRAINED, *METHODS, CALIBRATED, VOTE, CONSTANT)
CLAIMED = (UNTRAINED, "F2C", "swarm")
RATE = {"F2C": 3e-5, "CCE alone": 1e-4, "swarm": 1e-4}
RATES, TUNED_ON = (3e-5, 1e-4), ("topics", "sentiment")
STEPS, ITEMS, SELECTED = 32, 8, (4, 8, 16, 32)
TRAINED_FORMATS, HELD_OUT, VALIDATION, ELSEWHERE, PILOT_SHARE = 6, 100, 30, 15, 0.2
METRICS = (
    "agreement", "f1", "f1_spread", "accuracy", "largest_share", "amplification",
    "new_agreement", "new_f1", "task_agreement", "task_f1", "last_agreement", "last_f1", "last_largest_share",
    "last_amplification", "selected_step",
)  # fmt: skip
SETTINGS = {
    "model": "smollm2", "rate": RATE, "steps": STEPS, "selected": SELECTED, "items a step": ITEMS,
    "formats": TRAINED_FORMATS, "held out": HELD_OUT, "validation": VALIDATION,
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

    def __init__(self, name: str, seed: int, job: Job, tokenizer: Any):
        disable_progress_bars()
        trained, new = drawn(name, seed, job)
        train, test = split(name, seed, job)
        known = min(job.scaled(VALIDATION, tiny=3), len(train) // 3)
        self.validation = encoded(trained, train[:known], tokenizer)
        train = train[known:][: job.scaled(STEPS * ITEMS, tiny=4)]
        self.parts = {"train": encoded(trained, train, tokenizer), "test": encoded(trained, test, tokenizer)}
        self.parts["new"] = encoded(new, test, tokenizer)
        for other in SETS:
            if other != name:
                items = split(other, seed, job)[1][: job.scaled(ELSEWHERE, tiny=4)]
                self.parts[f"task {other}"] = encoded(drawn(other, seed, job)[0], items, tokenizer)

    def scores(self, trainer: F2CTrainer, train: bool = False) -> dict[str, np.ndarray]:
        """Part -> scores."""
        return {part: scored(trainer, rows) for part, rows in self.parts.items() if train or part != "train"}


def trainer_of(
    arm: str, model: Any, seed: int, job: Job, rows: Dataset | None = None, rate: float | None = None
) -> F2CTrainer:
    """The trainer of an arm, at its own rate by default; that of the untrained model is never trained."""
    rate = RATE.get(arm, 0.0) if rate is None else rate
    config = F2CConfig(
        output_dir=str(job.work / "run"), method=METHODS.get(arm, "f2c"), max_steps=job.scaled(STEPS, tiny=2),
        per_device_train_batch_size=2 if job.tiny else ITEMS, learning_rate=rate,
        lr_scheduler_type="constant", seed=seed, bf16=True, use_cpu=job.device == "cpu", logging_steps=2,
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
    file = job.work / f"untrained-{name}-{seed}.npz"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, **evaluation.scores(trainer_of(UNTRAINED, model, seed, job), train=True))
    with np.load(file) as stored:
        return dict(stored)


class Selection(TrainerCallback):
    """Keeps the adapter of the step, among some, with the best F1 on labeled validation items; the first of equals."""

    def __init__(self, trainer: F2CTrainer, rows: Dataset, steps: tuple[int, ...]):
        self.trainer, self.rows, self.steps = trainer, rows, steps
        self.step, self.f1, self.kept = 0, -1.0, {}

    def adapter(self) -> dict[str, torch.Tensor]:
        """The parameters that are trained."""
        return {name: p for name, p in self.trainer.model.named_parameters() if p.requires_grad}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Scores the validation items after one of the steps."""
        if state.global_step in self.steps:
            table = scored(self.trainer, self.rows)
            f1 = consistency(table.argmax(-1), np.array(self.rows["gold"]), table.shape[2]).f1
            if f1 > self.f1:
                kept = {name: p.detach().clone() for name, p in self.adapter().items()}
                self.step, self.f1, self.kept = state.global_step, f1, kept

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the adapter that was kept back into the model."""
        for name, parameter in self.adapter().items():
            parameter.copy_(self.kept[name])


def trained(
    arm: str, seed: int, job: Job, evaluation: Evaluation, model: Any, rate: float | None = None
) -> tuple[dict[str, Any], Any, Any]:
    """The predictions by part of the step that validation selects, the last step's on held-out items, and facts."""
    trainer = trainer_of(arm, model, seed, job, evaluation.parts["train"], rate)
    selection = Selection(trainer, evaluation.validation, (1, 2) if job.tiny else SELECTED)
    trainer.add_callback(selection)
    trainer.train()
    last = scored(trainer, evaluation.parts["test"]).argmax(-1)
    at_end = selection.step == trainer.state.global_step
    selection.restore()
    predicted = {
        part: last if at_end and part == "test" else scored(trainer, rows).argmax(-1)
        for part, rows in evaluation.parts.items() if part != "train"
    }  # fmt: skip
    logged = {name: [row[name] for row in trainer.state.log_history if name in row] for name in ("consensus", "loss")}
    facts = {
        "consensus": np.mean(logged["consensus"]),
        "first_loss": logged["loss"][0],
        "last_loss": logged["loss"][-1],
    }
    facts |= {"selected_step": selection.step, "validation_f1": selection.f1}
    return predicted, last, {name: float(value) for name, value in facts.items()}


def run(arm: str, seed: int, job: Job, name: str, rate: float | None = None) -> dict[str, float]:
    """The metrics of an arm under a seed, which draws the items, the formats, and the order of training."""
    set_seed(seed)
    model, tokenizer = load(job)
    evaluation = Evaluation(name, seed, job, tokenizer)
    gold = {part: np.array(rows["gold"]) for part, rows in evaluation.parts.items()}
    before = untrained(name, seed, job, evaluation, model)
    choices = {part: table.shape[2] for part, table in before.items()}
    first = {part: table.argmax(-1) for part, table in before.items()}
    if arm in METHODS:
        predicted, last, facts = trained(arm, seed, job, evaluation, model, rate)
    else:
        predicted = controlled(arm, before, first, gold, choices)
        last, facts = predicted["test"], {"selected_step": 0.0}
    found = measured(predicted, gold, choices) | facts
    c, end = choices["test"], consistency(last, gold["test"], choices["test"])
    found |= {"last_agreement": end.agreement, "last_f1": end.f1, "last_largest_share": max(end.marginals)}
    for prefix, table in (("", predicted["test"]), ("last_", last)):
        found[f"{prefix}amplification"] = amplification(first["test"], table, gold["test"], c)
    vote = votes(first["train"], c)
    single, together = (
        consistency(table, gold["train"], c).f1 for table in (first["train"], np.repeat(vote[:, None], 2, 1))
    )
    return found | {
        "train_vote_accuracy": float((vote == gold["train"]).mean()), "train_vote_gain": together - single,
        "train_vote_share": float(np.bincount(vote, minlength=c).max() / len(vote)),
    }  # fmt: skip


def plan_of(name: str) -> Plan:
    """The study of a label set."""
    claims = (
        Claim("F2C", "agreement", 0.05), Claim("F2C", "f1", 0.03),
        Claim("F2C", "f1", 0.03, against="swarm"),
    )  # fmt: skip
    return Plan(f"f2c-{name}", ARMS, UNTRAINED, METRICS, claims, SEEDS, partial(run, name=name), SETTINGS, CLAIMED)


POOLED = Plan(
    "f2c-pooled", ARMS, UNTRAINED, METRICS,
    (
        Claim("F2C", "agreement", 0.05), Claim("F2C", "f1", 0.03), Claim("F2C", "new_f1", 0.03),
        Claim("F2C", "f1", 0.03, against="swarm"), Claim("F2C", "last_f1", 0.03),
    ),
    SEEDS * len(SETS), pooled, SETTINGS, CLAIMED,
)  # fmt: skip
PLANS = (*(plan_of(name) for name in SETS), POOLED, WHEN)
app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def rates() -> None:
    """Print the rate of each arm with the best mean F1 on the pilot's items of two label sets, at the step kept."""
    job = Job(WORK / "f2c")
    study = tuning(POOLED.name, job, {"steps": STEPS, "sets": TUNED_ON})
    for arm in METHODS:
        tries = partial(run, arm, PILOT_SEED, job)
        print(arm, study.tuned(arm, RATES, lambda rate, t=tries: np.mean([t(name, rate)["f1"] for name in TUNED_ON])))


@app.command()
def formats(
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
    app()
