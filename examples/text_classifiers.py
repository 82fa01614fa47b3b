"""Classifiers that tell one kind of text from another: a small encoder under four objectives, and two controls.

    train, test = (labeled(ones, zeros, tokenizer) for ones, zeros in (...))
    [values] = scores("BCE, then tpAUC-KL", train, [test], encoder="smollm2", tokenizer=tokenizer, max_steps=20, ...)

All arms have the same encoder, cut to its first LAYERS layers, and the same number of updates; those of DXO train under
BCE for the first half. The controls are a bag of words and the length alone.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForSequenceClassification

import hf_xent
from hf_xent.models import loading

LAYERS = 3
BASELINE = "BCE"
ARMS = {
    BASELINE: {"loss": "bce"},
    "BCE, unbalanced batches": {"loss": "bce", "sampling_rate": None},
    "BCE, then tpAUC-KL": {"loss": "tpauc_kl"},
    "BCE, then pAUC-CVaR": {"loss": "pauc_cvar"},
}
CONTROLS = ("bag of words", "length in characters")


def labeled(ones: list[str], zeros: list[str], tokenizer: Any) -> Dataset:
    rows = Dataset.from_dict({"text": ones + zeros, "labels": [1] * len(ones) + [0] * len(zeros)})
    return rows.map(lambda batch: dict(tokenizer(batch["text"])), batched=True)


def trained(arm: str, train: Dataset, encoder: str, tokenizer: Any, **options: Any) -> hf_xent.DXOTrainer:
    """An arm's classifier: half of the updates under BCE, then its loss at half the learning rate."""
    shape = {"num_labels": 1, "num_hidden_layers": LAYERS, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(options["seed"])  # for the weights of the new head
    model = AutoModelForSequenceClassification.from_pretrained(loading.resolve(encoder), **shape)
    config = hf_xent.DXOConfig(
        per_device_train_batch_size=16, per_device_eval_batch_size=50, warm_start=0.5, dxo_learning_rate=1e-4,
        learning_rate=2e-4, lr_scheduler_type="constant", logging_steps=10, save_strategy="no", report_to="none",
        **{**options, **ARMS[arm]},
    )  # fmt: skip
    trainer = hf_xent.DXOTrainer(model, config, train_dataset=train, processing_class=tokenizer)
    trainer.train()
    return trainer


def scores(arm: str, train: Dataset, sets: list[Dataset], **options: Any) -> list[Any]:
    """The scores of the texts of every set; a larger one indicates label 1."""
    if arm == CONTROLS[1]:
        return [[len(text) for text in rows["text"]] for rows in sets]
    if arm == CONTROLS[0]:
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        model = LogisticRegression(C=10.0, class_weight="balanced")
        model.fit(words.fit_transform(train["text"]), train["labels"])
        return [model.decision_function(words.transform(rows["text"])) for rows in sets]
    trainer = trained(arm, train, **options)
    return [trainer.predict(rows).predictions[:, 0] for rows in sets]
