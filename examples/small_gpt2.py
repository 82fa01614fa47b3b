"""A small GPT-2 that reads each token once: its text, its shape, and a run with the curve of its held-out losses.

loss_curves.py and scaling_grid.py use it. A run that has been made is read from its files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import concatenate_datasets
from pretrain_gpt2 import train_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from hf_xent import data, laws
from hf_xent.callbacks.curve import CurveCallback

CONTEXT, ROWS = 64, 8


def blocks(text: str) -> dict[str, Any]:
    """Blocks of tokens of texts that commas separate, a twentieth of the documents held out; and the tokenizer."""
    texts = concatenate_datasets([data.load_text(source).select_columns(["text"]) for source in text.split(",")])
    parts = texts.shuffle(seed=0).train_test_split(test_size=0.05, seed=0)
    tokenizer = train_tokenizer(parts["train"]["text"][:])
    return {name: data.pack(part, tokenizer, CONTEXT) for name, part in parts.items()} | {"tokenizer": tokenizer}


def gpt2(tokenizer: Any, width: int, layers: int) -> GPT2LMHeadModel:
    """Heads of 16 features, and no dropout."""
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id, "n_positions": CONTEXT}
    shape = {"n_embd": width, "n_layer": layers, "n_head": width // 16, "vocab_size": len(tokenizer)}
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**shape, **ends, **off, activation_function="gelu_pytorch_tanh"))


def run(rows: dict[str, Any], shape: tuple[int, int], seed: int, file: Path, **training: Any) -> laws.Curve:
    """The held-out losses of a run, after every `eval_steps` of its steps.

    Args:
        rows: As of `blocks`.
        shape: Width and layers.
        seed: Of the weights and of the order of the rows.
        file: The CSV file of the run; the losses are beside it.
        **training: Arguments of `TrainingArguments`.

    Returns:
        The curve, with the learning rate of every step.
    """
    losses = file.with_suffix(".json")
    if not losses.exists():
        file.unlink(missing_ok=True)  # of a run that was interrupted
        set_seed(seed)
        arguments = TrainingArguments(
            str(file.parent), per_device_train_batch_size=ROWS, per_device_eval_batch_size=64, seed=seed, use_cpu=True,
            report_to="none", eval_strategy="steps", save_strategy="no", disable_tqdm=True, **training,
        )  # fmt: skip
        parts = {"train_dataset": rows["train"], "eval_dataset": rows["test"], "callbacks": [CurveCallback(file)]}
        trainer = Trainer(gpt2(rows["tokenizer"], *shape), arguments, **parts)
        trainer.train()
        found = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
        losses.write_text(json.dumps(found))
    held_out, every = json.loads(losses.read_text()), laws.read(file)
    return laws.Curve(every.lr, [*map(int, held_out)], [*held_out.values()], every.params, name=file.stem)
