"""Self-judged rounds (OSP) on a task that a program can check, against that program, chance, and plain DPO.

    python examples/osp_rounds.py [--model smollm2] [--prompts 16] [--rounds 2] [--seeds 3] [--output out/osp]

"What is rain? Answer in at most eight words." An answer of three to eight words that names the thing is right. Arms
differ in who judges the policy's samples: the policy itself, the program, or chance; DPO trains on the self-judged
pairs as if every label were certain. On held-out things: the share of right answers, and their words; of pairs of a
right and a wrong answer to one prompt, the share where the policy as a judge prefers the right one, and the Brier score
of its probabilities (0.25: knows nothing). Of the pairs trained on: mean strength, and the share that is the right way
round where only one answer is right. Started again, it goes on with the runs that are missing.
"""

from __future__ import annotations

import random
from pathlib import Path
from statistics import mean
from typing import Any

import peft
import typer
from datasets import Dataset

import hf_xent
from hf_xent import embedded, generation
from hf_xent.judging import ModelJudge, both_orders
from hf_xent.study import Study

THINGS = (
    "rain bread winter honey salt music coffee gold snow wood fire ice glass paper silk sugar iron sleep wind "
    "cheese tea rice smoke cotton sand butter milk wool clay thunder soap silver fog oil leather flour dust "
    "copper steel wine corn ink rubber wax coal marble grass amber"
)
ARMS = ("base model", "self-judge", "program judge", "random judge", "DPO on the self-judge's pairs")
METRICS = ("right", "words", "judge accuracy", "judge Brier", "strength", "pairs right")
K, NEW = 4, 20


def right(thing: str, text: str) -> bool:
    """The truth."""
    return 3 <= len(text.split()) <= 8 and thing in text.lower()


def program(rows: Any, first: Any, second: Any) -> list[float]:
    """The truth as a judge."""
    return [
        0.5 + (right(row["thing"], a) - right(row["thing"], b)) / 2
        for row, a, b in zip(rows, first, second, strict=True)
    ]


def chance(rows: Any, first: Any, second: Any) -> list[float]:
    """A judge that knows nothing and never hesitates."""
    return [random.Random(f"{a} / {b}").random() for a, b in zip(first, second, strict=True)]


JUDGES = {"program judge": program, "random judge": chance}


class HardLabels(hf_xent.OSPTrainer):
    """DPO on pairs that another run has made."""

    def begin_epoch(self, epoch: int, resumed: bool) -> None:
        """Reads them, never samples."""
        super().begin_epoch(epoch, resumed=True)

    def pairs(self, number: int) -> Dataset:
        """As they were, but certain."""
        return super().pairs(number).map(lambda _: {"preference_prob": 1.0})


def questions(things: list[str]) -> Dataset:
    ask = "What is {}? Answer in at most eight words."
    prompts = [[{"role": "user", "content": ask.format(thing)}] for thing in things]
    return Dataset.from_dict({"prompt": prompts, "thing": things})


def train(
    arm: str, model: Any, tokenizer: Any, rows: Dataset, seed: int, rounds: int, output: Path
) -> dict[str, float]:
    """Trains the model in place; returns what its pairs were like."""
    name = "self-judge" if arm.startswith("DPO") else arm  # whose pairs they are
    config = hf_xent.OSPConfig(
        output_dir=str(output / name / f"seed-{seed}"), num_train_epochs=rounds, num_generations=K, max_new_tokens=NEW,
        generation_batch_size=64, per_device_train_batch_size=4, learning_rate=1e-3, lr_scheduler_type="constant",
        seed=seed, save_strategy="no", logging_steps=1, report_to="none", bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    kind = HardLabels if arm.startswith("DPO") else hf_xent.OSPTrainer
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    trainer = kind(
        model, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=lora, judge=JUDGES.get(arm)
    )
    trainer.train()
    pairs = [row for number in range(rounds) for row in trainer.pairs(number)]
    truth = [tuple(right(row["thing"], row[side][0]["content"]) for side in ("chosen", "rejected")) for row in pairs]
    decided = [chosen for chosen, rejected in truth if chosen != rejected]
    found = {"strength": mean(row["preference_prob"] for row in pairs)}
    return found | ({"pairs right": mean(decided)} if decided else {})


def evaluate(model: Any, tokenizer: Any, rows: Dataset, seed: int) -> dict[str, float]:
    """Right answers among samples, and the model's judgment of them."""
    repeated = [row for row in rows for _ in range(K)]
    ids = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in repeated]
    texts = tokenizer.batch_decode(
        generation.responses(model.eval(), ids, tokens=NEW, seed=seed), skip_special_tokens=True
    )
    truth = [right(row["thing"], text) for row, text in zip(repeated, texts, strict=True)]
    metrics = {"right": mean(truth), "words": mean(len(text.split()) for text in texts)}
    groups = [range(i, i + K) for i in range(0, len(texts), K)]
    mixed = [(i, j) for group in groups for i in group for j in group if truth[i] and not truth[j]]
    if mixed:
        better, worse = ([texts[pair[side]] for pair in mixed] for side in (0, 1))
        p = both_orders(ModelJudge(model, tokenizer), [repeated[i] for i, _ in mixed], better, worse).p
        metrics["judge accuracy"] = float(((p > 0.5).double() + (p >= 0.5)).mean() / 2)
        metrics["judge Brier"] = float((1 - p).square().mean())
    return metrics


def main(
    model: str = "smollm2", prompts: int = 16, rounds: int = 2, seeds: int = 3, output: Path = Path("out/osp")
) -> dict[str, Any]:
    """Every arm under every seed; returns the metrics by arm and seed."""
    settings = {"model": model, "prompts": prompts, "rounds": rounds, "samples a prompt": K, "new tokens": NEW}
    study = Study("Self-judged rounds", METRICS, "base model", output, seeds, settings)
    for arm, seed in study.runs(ARMS):
        things = random.Random(seed).sample(THINGS.split(), 2 * prompts)
        policy, tokenizer = embedded.load(model)
        rows, held_out = questions(things[:prompts]), questions(things[prompts:])
        found = {} if arm == "base model" else train(arm, policy, tokenizer, rows, seed, rounds, output)
        study.record(arm, seed, **found, **evaluate(policy, tokenizer, held_out, seed))
    return study.report("Made by `examples/osp_rounds.py` of hf_xent; what the columns are is said there.")


if __name__ == "__main__":
    typer.run(main)
