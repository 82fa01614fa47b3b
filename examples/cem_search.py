"""The cross-entropy method against random search, for four options of a training run, at 20 runs each, 10 times.

A GPT-2 of one layer and 64 features learns the bytes of Python documentation for 150 steps. Options: learning rate and
weight decay (logarithmic), warm-up steps, beta2 of Adam. A search has 20 runs of one seed; the method takes them in
four rounds of five, of which it fits two, and both arms have the same first round. About 12 core-minutes; it resumes.

What counts was decided before the runs: `test loss`, the mean loss on other text of two runs with the options that a
search chose and with seeds that no search has used. The difference is that of ten pairs, with Student's 95 % interval;
the method is better if the interval is below 0. Expected: it contains 0. `best loss` is the loss by which a search
chose, `at half` the best after its first 10 runs; `learning rate` is log10 of the chosen one.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import typer
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from hf_xent import data
from hf_xent.cem import minimize
from hf_xent.experiments.study import Study

SPACE = "learning_rate=1e-4..1e-1:log weight_decay=1e-4..1:log warmup_steps=0..75 adam_beta2=0.9|0.95|0.99|0.999"
SEARCH = {"candidates": 5, "elites": 0.4, "rounds": 4}
ARMS = {"random search": "random", "cross-entropy method": "cem"}
METRICS = ("test loss", "best loss", "at half", "learning rate")
STEPS, ROWS, BLOCK, HELD_OUT = 150, 8, 64, 256
SHAPE: dict[str, Any] = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": BLOCK, "vocab_size": 256}
SHAPE |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) | {"bos_token_id": None, "eos_token_id": None}


def parts_of(text: str) -> dict[str, Dataset]:
    """Blocks of bytes, in a fixed random order: for training, for the searches to choose by, and for the test."""
    joined = np.frombuffer("\n".join(data.load_text(text)["text"][:]).encode(), dtype=np.uint8)
    rows = np.random.default_rng(0).permutation(joined[: len(joined) // BLOCK * BLOCK].reshape(-1, BLOCK)).tolist()
    splits = {"train": rows[: -2 * HELD_OUT], "validation": rows[-2 * HELD_OUT : -HELD_OUT], "test": rows[-HELD_OUT:]}
    return {name: Dataset.from_dict({"input_ids": part, "labels": part}) for name, part in splits.items()}


def loss(parts: dict[str, Dataset], split: str, seed: int, folder: Path, options: dict[str, Any]) -> float:
    """The loss on a split after a run, nats per byte; nan if it has diverged."""
    set_seed(seed)
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=ROWS, per_device_eval_batch_size=HELD_OUT, seed=seed,
        lr_scheduler_type="cosine", logging_steps=1000, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(GPT2LMHeadModel(GPT2Config(**SHAPE)), arguments, train_dataset=parts["train"])
    trainer.train()
    return float(trainer.evaluate(parts[split])["eval_loss"])


def searched(parts: dict[str, Dataset], method: str, seed: int, folder: Path) -> dict[str, float]:
    """The metrics of one search."""
    objective = partial(loss, parts, "validation", seed, folder)
    found = minimize(objective, SPACE.split(), **SEARCH, method=method, seed=seed)
    again = [loss(parts, "test", 1000 + 2 * seed + run, folder, found.best) for run in range(2)]
    numbers = (mean(again), found.score, found.history[1].best, math.log10(found.best["learning_rate"]))
    return dict(zip(METRICS, numbers, strict=True))


def main(seeds: int = 10, output: Path = Path("out/cem_search"), text: str = "pydoc") -> dict[str, Any]:
    """Searches with both methods, and reports them."""
    settings = {"space": SPACE, **SEARCH, "text": text, "steps": STEPS}
    study, parts = Study("CEM", METRICS, "random search", output, seeds, settings), parts_of(text)
    for arm, seed in study.runs(ARMS):
        study.record(arm, seed, **searched(parts, ARMS[arm], seed, output / "runs"))
    return study.report(str(__doc__))


if __name__ == "__main__":
    typer.run(main)
