"""The geometry of representations while a GPT-2 of 1 M weights is pre-trained: RankMe and alpha against tokens.

    python examples/geometry_pretraining.py [--text pydoc] [--steps 256] [--seeds 3] [--output out/geometry_pretraining]

`--text` is a source for `hf_xent.data.load_text`; 'brown:FOLDER' has enough documents. 52 % of them, at most 256, are
held out, and their first 64 tokens are read before the training, at steps 1, 2, 4, ... and at the end. Controls: the
untrained model, which is step 0, and the same training on the same tokens in random order. Resumable, run by run.
What counts was decided before the runs. Of one seed, with sd of the bootstrap over documents added in squares:
- RankMe falls if its least value is over 3 sd below step 0, and rises if the end is over 3 sd above the least: 3, since
  the least of ten is chosen. Either is seen only if all seeds show it.
- It is due to the text's order if the difference to the control, seed by seed, has a 95 % interval without 0.
A quarter of a million tokens cannot show a late phase of compression: none is claimed.
"""

from pathlib import Path
from typing import Any

import numpy as np
import typer
from datasets import Dataset
from pretrain_gpt2 import FAST, train_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

import hf_xent
from hf_xent import data
from hf_xent.callbacks.geometry import GeometryCallback
from hf_xent.experiments.geometry import draw_curves, read_curve, table
from hf_xent.experiments.study import Study

TEXT, CONTROL = "text", "shuffled tokens"
METRICS = ("loss", "RankMe before", "RankMe least", "RankMe end", "fall (sd)", "rise (sd)", "alpha before", "alpha end")
SIZE = {"n_layer": 4, "n_embd": 128, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONTEXT, ROWS, DOCUMENTS, LENGTH, RESAMPLES = 128, 8, 256, 64, 100


def pretrain(blocks: dict[str, Dataset], held_out: list[str], tokenizer: Any, seed: int, output: Path) -> float:
    """Train a new model and measure it; returns the loss of held-out blocks, in nats a token."""
    set_seed(seed)
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=CONTEXT, **ends, **FAST, **SIZE))
    config = hf_xent.XentConfig(
        output_dir=str(output), num_train_epochs=1, per_device_train_batch_size=ROWS, learning_rate=2e-3, seed=seed,
        warmup_steps=20, logging_steps=16, save_strategy="no", report_to="none", use_cpu=True, weight_decay=0.1,
    )  # fmt: skip
    reading = {"tokenizer": tokenizer, "max_length": LENGTH, "batch_size": 32}
    geometry = GeometryCallback(held_out, resamples=RESAMPLES, **reading)
    trainer = hf_xent.XentTrainer(model, config, train_dataset=blocks["train"], callbacks=[geometry])
    trainer.train()
    return trainer.evaluate(blocks["test"])["eval_loss"]


def described(run: dict[str, np.ndarray]) -> dict[str, float]:
    """The numbers of a curve: before, the least, and the end; falls and rises in their standard deviations."""
    values, sd, least = run["rankme"], run["rankme_sd"], int(run["rankme"].argmin())
    fall, rise = ((values[i] - values[least]) / np.hypot(sd[i], sd[least]) for i in (0, -1))
    numbers = [values[0], values[least], values[-1], fall, rise, run["alpha"][0], run["alpha"][-1]]
    return dict(zip(METRICS[1:], numbers, strict=True))


def main(text: str = "pydoc", steps: int = 256, seeds: int = 3, output: Path = Path("out/geometry_pretraining")) -> Any:
    """Both arms under every seed; returns the metrics by arm and seed."""
    settings = {"text": text.partition(":")[0], "steps": steps, "tokens a step": ROWS * CONTEXT, "documents": DOCUMENTS}
    study = Study("Geometry of pre-training", METRICS, CONTROL, output, seeds, settings)
    texts = data.load_text(text).select_columns("text").train_test_split(test_size=0.52, seed=0)  # by document
    tokenizer = train_tokenizer(texts["train"]["text"][:])
    packed = {name: data.pack(part, tokenizer, block_size=CONTEXT) for name, part in texts.items()}
    rows = np.array(packed["train"].shuffle(seed=0)["input_ids"][: steps * ROWS])
    curves = {arm: [output / arm / f"seed-{i}" / "geometry.csv" for i in range(seeds)] for arm in (TEXT, CONTROL)}
    for arm, seed in study.runs(curves):
        mixed = np.random.default_rng(seed).permutation(rows.ravel()).reshape(rows.shape) if arm == CONTROL else rows
        blocks = {"train": Dataset.from_dict({"input_ids": mixed, "labels": mixed}), "test": packed["test"].take(64)}
        loss = pretrain(blocks, texts["test"]["text"][:DOCUMENTS], tokenizer, seed, curves[arm][seed].parent)
        study.record(arm, seed, loss=loss, **described(read_curve(curves[arm][seed])))
    draw_curves(curves, output / "curves.png")
    tables = "\n\n".join(table(curves, column) for column in ("rankme", "singular_rankme", "alpha"))
    return study.report(f"Made by `examples/geometry_pretraining.py` of hf_xent.\n\n![Curves](curves.png)\n\n{tables}")


if __name__ == "__main__":
    typer.run(main)
