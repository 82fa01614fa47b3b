"""Self-judged rounds (OSP) on a task that a program can check; compare with other judges and plain DPO.

    python examples/osp_rounds.py [--model smollm2] [--prompts 16] [--rounds 2] [--seeds 3] [--output out/osp]

The task is that of eight_words.py: to say what rain is in at most eight words. The arms differ in the judge of the
policy's samples: the policy itself, the program, or chance; DPO trains on the self-judged pairs as if every label were
certain. Measured on held-out things: the share of right answers, and their words; for pairs of a right and a wrong
answer, how often the policy as a judge prefers the right one, and its Brier score (0.25 for constant 1/2). Measured on
the training pairs: mean strength, and, where one answer is right, how often it is the chosen one. Resumable.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import peft
import typer
from datasets import Dataset
from eight_words import NEW, THINGS, K, chance, described, evaluate, program, questions

import hf_xent
from hf_xent.experiments.study import Study
from hf_xent.models import loading

JUDGES = {"self-judge": None, "program judge": program, "random judge": chance}
BASE, HARD = "base model", "DPO on the self-judge's pairs"
METRICS = ("right", "words", "judge accuracy", "judge Brier", "strength", "pairs right")


class HardLabels(hf_xent.OSPTrainer):
    """DPO on the pairs of another run."""

    def begin_epoch(self, epoch: int, resumed: bool) -> None:
        """Reads the pairs, and never samples."""
        super().begin_epoch(epoch, resumed=True)

    def pairs(self, number: int) -> Dataset:
        """The pairs of the other run, with certain labels."""
        return super().pairs(number).map(lambda _: {"preference_prob": 1.0})


def train(
    arm: str, model: Any, tokenizer: Any, rows: Dataset, seed: int, rounds: int, output: Path
) -> dict[str, float]:
    """Trains the model in place; returns metrics of its pairs."""
    name = "self-judge" if arm == HARD else arm  # the run that makes the pairs
    config = hf_xent.OSPConfig(
        output_dir=str(output / name / f"seed-{seed}"), num_train_epochs=rounds, num_generations=K, max_new_tokens=NEW,
        generation_batch_size=64, per_device_train_batch_size=4, learning_rate=1e-3, lr_scheduler_type="constant",
        seed=seed, save_strategy="no", logging_steps=1, report_to="none", bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer_class = HardLabels if arm == HARD else hf_xent.OSPTrainer
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    parts = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": lora}
    trainer = trainer_class(model, args=config, judge=JUDGES.get(arm), **parts)
    trainer.train()
    return described([row for number in range(rounds) for row in trainer.pairs(number)])


def main(
    model: str = "smollm2", prompts: int = 16, rounds: int = 2, seeds: int = 3, output: Path = Path("out/osp")
) -> dict[str, Any]:
    """Every arm under every seed; returns the metrics by arm and seed."""
    settings = {"model": model, "prompts": prompts, "rounds": rounds, "samples a prompt": K, "new tokens": NEW}
    study = Study("Self-judged rounds", METRICS, BASE, output, seeds, settings)
    for arm, seed in study.runs([BASE, *JUDGES, HARD]):
        things = random.Random(seed).sample(THINGS.split(), 2 * prompts)
        policy, tokenizer = loading.load(model)
        rows, held_out = questions(things[:prompts]), questions(things[prompts:])
        metrics = {} if arm == BASE else train(arm, policy, tokenizer, rows, seed, rounds, output)
        study.record(arm, seed, **metrics, **evaluate(policy, tokenizer, held_out, seed))
    return study.report("Made by `examples/osp_rounds.py` of hf_xent, which describes the columns.")


if __name__ == "__main__":
    typer.run(main)
