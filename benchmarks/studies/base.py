"""A GPT-2 of 14 million parameters, pre-trained on the encyclopedia and the manuals of corpora.py, read once.

    python -m benchmarks.studies.base out/studies/text out/studies/base

Studies of fine-tuning start from it; the Brown corpus and a tenth of the other documents are left to them. Resumable.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_xent
from hf_xent import data

VOCABULARY, CONTEXT, ROWS, RATE, END = 8192, 256, 8, 1.5e-3, "<|endoftext|>"
SIZE = {"n_layer": 6, "n_embd": 384, "n_head": 6, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SOURCES = (
    "wiki", "anarchism", "debian-handbook", "debian-reference", "debian-policy", "developers-reference", "maint-guide",
)  # fmt: skip


def documents(text: Path, *sources: str) -> dict[str, Dataset]:
    """The documents of some sources, shuffled: 'train', and 'test', which is every tenth of each source."""
    parts: dict[str, list[str]] = {"train": [], "test": []}
    for source in sources:
        files = sorted((text / source).glob("*.txt"))
        if not files:
            raise ValueError(f"{text / source} has no .txt files: run `python -m benchmarks.studies.corpora`")
        for i, file in enumerate(files):
            parts["test" if i % 10 == 9 else "train"].append(file.read_text(encoding="utf-8"))
    return {name: Dataset.from_dict({"text": texts}).shuffle(seed=0) for name, texts in parts.items()}


def train_tokenizer(texts: list[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE of these texts."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, bos_token=END, pad_token=END)


def new_model(tokenizer: Any, **size: Any) -> GPT2LMHeadModel:
    """A model with random weights."""
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = SIZE | {"n_positions": CONTEXT, "activation_function": "gelu_pytorch_tanh"} | size
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **ends, **shape))


def main(
    text: Annotated[Path, typer.Argument(help="The folder that corpora.py has written.")],
    output: Annotated[Path, typer.Argument(help="The folder of the model; checkpoints are kept in it, too.")],
    device: Annotated[str, typer.Option(help="'cpu' or 'cuda'.")] = "cpu",
) -> None:
    """Pre-trains the model, unless the folder has it."""
    if (output / "pretrained.json").exists():
        print((output / "pretrained.json").read_text())
        return
    parts = documents(text, *SOURCES)
    tokenizer = train_tokenizer(parts["train"]["text"][:])
    blocks = {name: data.pack(part, tokenizer, block_size=CONTEXT) for name, part in parts.items()}
    set_seed(0)
    config = hf_xent.XentConfig(
        output_dir=str(output / "checkpoints"), num_train_epochs=1, per_device_train_batch_size=ROWS, warmup_steps=50,
        learning_rate=RATE, lr_scheduler_type="cosine", weight_decay=0.1, adam_beta2=0.95, bf16=True,
        use_cpu=device == "cpu", logging_steps=50, save_steps=200, save_total_limit=1, report_to="none",
        per_device_eval_batch_size=32, memory_budget=2**26,
    )  # fmt: skip
    model = new_model(tokenizer)
    trainer = hf_xent.XentTrainer(model, config, train_dataset=blocks["train"], eval_dataset=blocks["test"])
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(config.output_dir))
    report = {
        "loss": math.log(trainer.evaluate()["eval_perplexity"]), "tokens": len(blocks["train"]) * CONTEXT,
        "parameters": model.num_parameters(), "torch": torch.__version__,
    }  # fmt: skip
    hf_xent.unpatch(model).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "pretrained.json").write_text(json.dumps(report, indent=1))
    print(report)


if __name__ == "__main__":
    typer.run(main)
