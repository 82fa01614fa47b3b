"""Fine-tune a chat model on answers whose words are in a noisy order: cross-entropy against EISL.

    python examples/noisy_instructions.py wordnet:FOLDER [--model smollm2] [--steps 24] [--seeds 3] [--noises 0.5,0]

Questions ask for definitions of words (FOLDER is usr/share/wordnet of Debian's wordnet-base), or are data with columns
`question` and `answer`. Words of training answers trade places; held-out answers are clean: `nll` per token, `F1` of
words, in any order, and `F1 of pairs`, of neighbours, of greedy answers. The first half of the steps is of
cross-entropy in all arms. Control: the model before training. Decided before: EISL helps if the 95 % interval of its
`F1 of pairs` minus that of cross-entropy is above 0 at half of noise; without noise no difference is expected.
"""

from itertools import pairwise
from math import log
from pathlib import Path
from statistics import mean
from typing import Any

import peft
import typer
from datasets import Dataset
from definitions import f1, questions
from short_answers import encode
from transformers import DataCollatorForSeq2Seq

from hf_xent.data.target_noise import TargetNoise
from hf_xent.experiments.study import Study
from hf_xent.generation import sampling
from hf_xent.models import loading
from hf_xent.trainers import EISLConfig, EISLTrainer
from hf_xent.trainers.noisefit import lora_config

CE, BEFORE, METRICS = "cross-entropy", "before training", ("nll", "F1", "F1 of pairs")
ARMS: dict[str, dict[str, Any]] = {CE: {"loss": "cross_entropy"}, "EISL + cross-entropy": {}, BEFORE: {}}
HELD, NEW = 32, 24


def run(arm: str, seed: int, share: float, rows: Dataset, settings: dict[str, Any]) -> dict[str, float]:
    """The metrics of an arm on clean held-out answers."""
    model, tokenizer = loading.load(settings["model"])
    parts = rows.train_test_split(test_size=HELD, seed=seed)
    noisy = parts["train"].map(TargetNoise("shuffle", share, seed, column="answer"), with_indices=True)
    train, held = (part.map(encode, fn_kwargs={"tokenizer": tokenizer}) for part in (noisy, parts["test"]))
    config = EISLConfig(
        output_dir="out/run", max_steps=settings["steps"], ce_steps=0.5, seed=seed, learning_rate=5e-4,
        lr_scheduler_type="cosine", save_strategy="no", report_to="none", logging_strategy="no", **ARMS[arm],
    )  # fmt: skip
    tuned, collator = peft.get_peft_model(model, lora_config()), DataCollatorForSeq2Seq(tokenizer)
    trainer = EISLTrainer(tuned, config, train_dataset=train, data_collator=collator)
    if arm != BEFORE:
        trainer.train()
    samples = sampling.sample(tuned.eval(), held["prompt"], tokens=NEW, temperature=0)
    pairs = [(tokenizer.decode(ids).split(), text.split()) for ids, text in zip(samples, held["answer"], strict=True)]
    of_pairs = mean(f1([*pairwise(x)], [*pairwise(y)]) for x, y in pairs)
    nll = log(trainer.evaluate(held)["eval_perplexity"])
    return {"nll": nll, "F1": mean(f1(x, y) for x, y in pairs), "F1 of pairs": of_pairs}


def main(
    source: str, model: str = "smollm2", steps: int = 24, seeds: int = 3, noises: str = "0.5,0",
    output: Path = Path("out/noisy_instructions"),
) -> dict[float, Any]:  # fmt: skip
    """All noises, arms and seeds; returns the results by noise."""
    rows, found = questions(source), {}
    for share in map(float, noises.split(",")):
        settings = {"model": model, "data": source.partition(":")[0], "steps": steps}
        study = Study(f"{share:.0%} shuffled", METRICS, CE, output / str(share), seeds, settings)
        for arm, seed in study.runs(ARMS):
            study.record(arm, seed, **run(arm, seed, share, rows, settings))
        found[share] = study.report("Made by `examples/noisy_instructions.py` of hf_xent.", base_model=model)
    return found


if __name__ == "__main__":
    typer.run(main)
