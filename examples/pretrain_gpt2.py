"""Pre-train a small GPT-2 from text alone: a byte-level BPE tokenizer, the model, and n-gram models as baselines.

    python examples/pretrain_gpt2.py [--text pydoc] [--steps 3000] [--output out/gpt2]

`--text` is a source for `hf_xent.data.load_text`: 'pydoc' needs no download, and is small; 'brown:FOLDER' is 6 MB. A
twentieth of the documents is held out. The optimizer is that of muon.py, the baselines are those of kneser_ney.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import typer
from kneser_ney import kneser_ney
from muon import Muon
from rich import print as show
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_xent
from hf_xent import data

VOCABULARY, CONTEXT, ROWS, END = 2048, 256, 16, "<|endoftext|>"
SIZE = {"n_layer": 6, "n_embd": 256, "n_head": 4, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.0}
FAST = {"activation_function": "gelu_pytorch_tanh"}  # GPT-2's activation as one kernel


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of these texts."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, bos_token=END, pad_token=END)


def pretrain(text: str, steps: int, output: Path) -> tuple[GPT2LMHeadModel, Any, dict[str, Any]]:
    """Model, tokenizer and blocks of tokens; resumed if it was interrupted, loaded if it is there."""
    texts = data.load_text(text).train_test_split(test_size=0.05, seed=0)  # by document
    done = (output / "config.json").exists()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output) if done else train_tokenizer(texts["train"]["text"][:])
    blocks = {name: data.pack(part, tokenizer, block_size=CONTEXT) for name, part in texts.items()}
    if done:
        return GPT2LMHeadModel.from_pretrained(output), tokenizer, blocks
    set_seed(0)
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=CONTEXT, **ends, **SIZE, **FAST))
    config = hf_xent.XentConfig(
        output_dir=str(output / "checkpoints"), max_steps=steps, per_device_train_batch_size=ROWS, warmup_steps=50,
        lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": steps // 3}, logging_steps=50,
        save_steps=250, save_total_limit=1, report_to="none", memory_budget=2**25, bf16=True,
        use_cpu=not torch.cuda.is_available(), eval_strategy="steps", eval_steps=500,
    )  # fmt: skip
    parts = {"train_dataset": blocks["train"], "eval_dataset": blocks["test"]}
    trainer = hf_xent.XentTrainer(model, config, **parts, optimizers=(Muon(model, lr=3e-3), None))
    resumed = get_last_checkpoint(config.output_dir) if Path(config.output_dir).exists() else None
    trainer.train(resume_from_checkpoint=resumed)
    hf_xent.unpatch(model).save_pretrained(output)
    tokenizer.save_pretrained(output)
    return model, tokenizer, blocks


def main(text: str = "pydoc", steps: int = 3000, output: Path = Path("out/gpt2")) -> dict[str, float]:
    """Pre-train, and compare with n-grams on the same held-out tokens; nats per predicted token."""
    model, tokenizer, blocks = pretrain(text, steps, output)
    rows = {name: list(part["input_ids"]) for name, part in blocks.items()}
    config = hf_xent.XentConfig(output_dir=str(output / "evaluation"), per_device_eval_batch_size=64, report_to="none")
    losses = {"gpt2": math.log(hf_xent.XentTrainer(model, config).evaluate(blocks["test"])["eval_perplexity"])}
    losses |= {f"kneser-ney {n}": kneser_ney(rows["train"], rows["test"], len(tokenizer), n) for n in (2, 3, 4)}
    report = losses | {"tokens": len(rows["train"]) * CONTEXT, "parameters": model.num_parameters()}
    show(report)
    (output / "pretrained.json").write_text(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    typer.run(main)
