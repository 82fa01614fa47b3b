"""Self-judged rounds (OSP) on a task that a program can check, against that program, chance, and plain DPO.

    python examples/osp_rounds.py [--model smollm2] [--prompts 16] [--rounds 2] [--seeds 3] [--output out/osp]

The task is that of eight_words.py: to say what rain is in at most eight words. Arms differ in who judges the policy's
samples: the policy itself, the program, or chance; DPO trains on the self-judged pairs as if every label were certain.
On held-out things: the share of right answers, and their words; of pairs of a right and a wrong answer to one prompt,
the share where the policy as a judge prefers the right one, and the Brier score of its probabilities (0.25: knows
nothing). Of the pairs trained on: mean strength, and the share that is the right way round where only one answer is
right. Started again, it goes on with the runs that are missing.
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
    """DPO on pairs that another run has made."""

    def begin_epoch(self, epoch: int, resumed: bool) -> None:
        """Reads them, never samples."""
        super().begin_epoch(epoch, resumed=True)

    def pairs(self, number: int) -> Dataset:
        """As they were, but certain."""
        return super().pairs(number).map(lambda _: {"preference_prob": 1.0})


def train(
    arm: str, model: Any, tokenizer: Any, rows: Dataset, seed: int, rounds: int, output: Path
) -> dict[str, float]:
    """Trains the model in place; returns what its pairs were like."""
    name = "self-judge" if arm == HARD else arm  # whose pairs they are
    config = hf_xent.OSPConfig(
        output_dir=str(output / name / f"seed-{seed}"), num_train_epochs=rounds, num_generations=K, max_new_tokens=NEW,
        generation_batch_size=64, per_device_train_batch_size=4, learning_rate=1e-3, lr_scheduler_type="constant",
        seed=seed, save_strategy="no", logging_steps=1, report_to="none", bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    kind = HardLabels if arm == HARD else hf_xent.OSPTrainer
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    parts = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": lora}
    trainer = kind(model, args=config, judge=JUDGES.get(arm), **parts)
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
        found = {} if arm == BASE else train(arm, policy, tokenizer, rows, seed, rounds, output)
        study.record(arm, seed, **found, **evaluate(policy, tokenizer, held_out, seed))
    return study.report("Made by `examples/osp_rounds.py` of hf_xent; what the columns are is said there.")


if __name__ == "__main__":
    typer.run(main)
