"""Does fine-tuning leave traces? Membership scores of a model after 0, 1, 2 and 4 epochs on a random half of its texts.

    python examples/membership.py [--source pydoc] [--members 40] [--seeds 3] [--output out/membership]

A text is a piece of a given number of words. Members and as many non-members are drawn at random from the same pieces,
so that they differ only in the training: the AUROC of the blind baseline, which reads words alone, has to stay near
0.5, and so has that of every score before the training. The reference is the model before the training; token
frequencies are counted on the remaining pieces. The seed determines the texts and their order.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import typer
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling

import hf_xent
from hf_xent import data, detection
from hf_xent.callbacks.membership import MembershipCallback
from hf_xent.detection.counts import count, smoothed
from hf_xent.experiments.study import Study
from hf_xent.models import loading
from hf_xent.patching import head_of

DOSES = (0, 1, 2, 4)  # epochs
SWEEP = detection.sweep("dc_pdd", a=(0.01, 0.1, 1.0))
SCORES = ("loss", "zlib", "min_k", "min_k_pp", "fast_detect", *SWEEP)
COLUMNS = {dose: f"{dose} epochs" for dose in DOSES}
BESIDE = ("auroc_low", "auroc_high", "tpr@5%fpr")
RESAMPLES = 300


def pieces(source: str, words: int, seed: int) -> list[str]:
    """All pieces of `words` words of a source, in the seed's order."""
    rows = [row["text"].split() for row in data.load_text(source)]
    texts = [" ".join(row[i : i + words]) for row in rows for i in range(0, len(row) - words + 1, words)]
    return random.Random(seed).sample(texts, len(texts))


def train(model: Any, tokenizer: Any, rows: list[list[int]], seed: int, output: Path, callback: Any) -> None:
    """DOSES[-1] epochs of cross-entropy on rows of token ids."""
    config = hf_xent.XentConfig(
        output_dir=str(output / "trainer"), num_train_epochs=DOSES[-1], per_device_train_batch_size=8, seed=seed,
        learning_rate=5e-5, lr_scheduler_type="constant", save_strategy="no", report_to="none", logging_steps=16,
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    rows = Dataset.from_dict({"input_ids": rows})
    hf_xent.XentTrainer(model, config, train_dataset=rows, data_collator=collator, callbacks=[callback]).train()


def main(
    model: str = "smollm2", source: str = "pydoc", members: int = 40, words: int = 24, seeds: int = 3,
    output: Path = Path("out/membership"),
) -> dict[str, Any]:  # fmt: skip
    """Every dose under every seed; returns the numbers by score and seed."""
    settings = {"model": model, "source": source, "members": members, "words": words}
    study = Study("Membership by dose", tuple(COLUMNS.values()), detection.BLIND, output, seeds, settings)
    for _, seed in study.runs([detection.BLIND]):  # it is recorded last
        drawn = pieces(source, words, seed)
        texts, others = drawn[: 2 * members], drawn[2 * members :]
        loaded, tokenizer = loading.load(model)
        q = smoothed(count(others, tokenizer, head_of(loaded).weight.shape[0]))
        scorer = detection.TextScorer(loaded, tokenizer, SCORES, frequencies=q)
        labels = [1] * members + [0] * members
        callback = MembershipCallback(scorer, texts, labels, DOSES, resamples=RESAMPLES)
        train(loaded, tokenizer, [ids for _, ids in scorer.tokenize(texts[:members])], seed, output, callback)
        for score in callback.results[0]:
            rows = {COLUMNS[dose]: metrics[score] for dose, metrics in callback.results.items()}
            beside = {f"{column}, {key}": row[key] for column, row in rows.items() for key in BESIDE}
            study.record(score, seed, **{column: row["auroc"] for column, row in rows.items()}, **beside)
    return study.report(f"{members} members and as many others from the same texts ({source}); AUROC of every score.")


if __name__ == "__main__":
    typer.run(main)
