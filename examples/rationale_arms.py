"""Classifiers of topics, masks on them, and other weights of their tokens.

classifier = fitted(encoder, tokenizer, train, folder, steps=200, seed=0)     3 layers of an encoder, kept in a folder
model = masked(arm, classifier, tokenizer, train, steps=60, ...)              the classifier stays as it is
weights = weigh(arm, model or classifier, inputs, words, ...)                 [B, T]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from planted_topics import TOPICS
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

from hf_xent import localization

LAYERS, LENGTH, RATE = 3, 64, 3e-4
MASKS = {
    "mask by CE": {"alpha": 1.0, "gamma": 0.0, "beta": 0.75},
    "mask by BAS": {"alpha": 0.0, "gamma": 1.0, "beta": 0.4},
    "mask by CE and BAS": {"alpha": 1.0, "gamma": 1.0, "beta": 1.3},
}
OTHERS = ("gradient x input", "attention", "occlusion", "log odds", "position", "random")


def encoded(rows: Dataset, tokenizer: Any) -> Dataset:
    texts = {name: rows[name][:] for name in ("text", "labels")}
    found = tokenizer(texts["text"], truncation=True, max_length=LENGTH)
    return Dataset.from_dict({"input_ids": found["input_ids"], "labels": texts["labels"]})


def train(model: Any, rows: Dataset, tokenizer: Any, steps: int, **options: Any) -> Any:
    arguments = TrainingArguments(max_steps=steps, per_device_train_batch_size=16, report_to="none",
                                  save_strategy="no", logging_steps=10, **options)  # fmt: skip
    collator = DataCollatorWithPadding(tokenizer)
    Trainer(model, arguments, train_dataset=encoded(rows, tokenizer), data_collator=collator).train()
    return model.eval()


def fitted(encoder: str, tokenizer: Any, rows: Dataset, folder: Path, **options: Any) -> Any:
    """A classifier, trained on the first call; its embeddings stay those of the encoder."""
    kind, names = AutoModelForSequenceClassification, dict(enumerate(TOPICS))
    if not (folder / "config.json").exists():
        torch.manual_seed(options["seed"])  # for the weights of the head
        model = kind.from_pretrained(encoder, num_hidden_layers=LAYERS, id2label=names)
        model.get_input_embeddings().requires_grad_(False)
        train(model, rows, tokenizer, learning_rate=RATE, **options).save_pretrained(folder)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # the masks see it as it is in use
    return kind.from_pretrained(folder, attn_implementation="eager", **still).requires_grad_(False).eval()


def masked(arm: str, classifier: Any, tokenizer: Any, rows: Dataset, **options: Any) -> Any:
    torch.manual_seed(options["seed"])
    model = localization.Rationale.from_classifier(classifier, tokenizer, **MASKS[arm])
    return train(model, rows, tokenizer, learning_rate=10 * RATE, **options)


def weigh(arm: str, model: Any, inputs: dict[str, Any], words: Any, known: dict[str, Any]) -> Any:
    """Weights of the tokens [B, T], for the predicted class."""
    if arm in MASKS:
        with torch.no_grad():
            return model(**inputs).masks
    if arm == "random":
        return torch.rand(words.shape, generator=torch.Generator().manual_seed(len(words)))
    if arm == "position":
        places = (words.cumsum(1) - 1).clamp(min=0) * len(known["places"]) // words.sum(1, keepdim=True)
        return known["places"][places.clamp(max=len(known["places"]) - 1)]
    if arm == "log odds":
        return known["odds"][model(**inputs).logits.argmax(-1)[:, None], inputs["input_ids"]]
    if arm == "occlusion":
        return localization.occlusion(model, inputs, words)
    by = {"gradient x input": localization.gradient_input, "attention": localization.last_attention}
    return by[arm](model, inputs)
