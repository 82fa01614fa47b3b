"""Texts longer than a model was trained on: rotary positions alone, with a harmonic bias, with ALiBi, and a window.

    python examples/beyond_window.py --text brown:FOLDER [--output out/beyond-window]        # 3 seeds

A small Llama learns blocks of 128 tokens, under each of three attentions. The last 64 tokens of held-out texts are
predicted from their last 128, 256, 512 and 1,024 tokens: the same tokens at every length. Arms named "at test" are the
model that was trained without a bias. The control is a window of 128 keys on that model, which needs no method.

What counts, decided beforehand: nats a token at 1,024, less those of the window, seed by seed; an arm helps if the 95 %
interval is below 0. And of the trained ones, harmonic less ALiBi. Seeds set weights and order; the texts are the same.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import typer
from pretrain_gpt2 import train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import hf_xent
from hf_xent import data
from hf_xent.attention import Harmonic, Linear, Window, attend, attending, unattend
from hf_xent.experiments.study import Study

BLOCK, ROWS, STEPS, SCORED, TEXTS, LENGTHS = 128, 16, 450, 64, 96, (128, 256, 512, 1024)
SIZE = {"hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 3, "num_attention_heads": 4}
TRAINED = {"none": None, "harmonic": Harmonic(), "ALiBi": Linear()}
AT_TEST = {"window of 128": Window(BLOCK), "rotary alone": None, "harmonic": Harmonic(), "ALiBi": Linear()}
ARMS = {f"{name} at test": ("none", bias) for name, bias in AT_TEST.items()}
ARMS |= {f"{name} in training": (name, TRAINED[name]) for name in ("harmonic", "ALiBi")}


def trained(name: str, seed: int, rows: Any, vocabulary: int, folder: Path) -> Any:
    """The model that was trained under a bias, which the folder keeps."""
    if not (folder / "config.json").exists():
        set_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=BLOCK, **SIZE))
        config = hf_xent.XentConfig(
            output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=ROWS, learning_rate=3e-3, seed=seed,
            warmup_steps=20, lr_scheduler_type="cosine", save_strategy="no", report_to="none", use_cpu=True,
        )  # fmt: skip
        if TRAINED[name] is not None:
            attend(model, TRAINED[name])
        hf_xent.XentTrainer(model, config, train_dataset=rows).train()
        unattend(hf_xent.unpatch(model)).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


@torch.no_grad()
def nats(model: Any, texts: torch.Tensor, length: int, scored: int) -> float:
    """Mean loss of the last `scored` tokens of the texts, given the last `length`."""
    losses = []
    for ids in texts[:, -length:].split(max(1, 4096 // length)):
        logits = model(ids, logits_to_keep=scored + 1).logits[:, :-1].float().transpose(1, 2)
        losses.append(torch.nn.functional.cross_entropy(logits, ids[:, -scored:], reduction="none"))
    return float(torch.cat(losses).mean())


def main(text: str = "pydoc", seeds: int = 3, output: Path = Path("out/beyond-window")) -> dict[str, Any]:
    """Every arm under every seed."""
    parts = data.load_text(text).train_test_split(test_size=0.1, seed=0)  # by document
    tokenizer = train_tokenizer(parts["train"]["text"][:])
    rows = data.pack(parts["train"], tokenizer, block_size=BLOCK)
    texts = torch.tensor(data.pack(parts["test"], tokenizer, block_size=LENGTHS[-1])["input_ids"][:TEXTS])
    settings = {"text": text, "steps": STEPS, "texts": len(texts), **SIZE}
    study = Study("Beyond the window", tuple(map(str, LENGTHS)), next(iter(ARMS)), output, seeds, settings)
    for arm, seed in study.runs(ARMS):
        name, bias = ARMS[arm]
        model = trained(name, seed, rows, len(tokenizer), output / f"{name}-{seed}").eval()
        with nullcontext() if bias is None else attending(model, bias):
            study.record(arm, seed, **{str(length): nats(model, texts, length, SCORED) for length in LENGTHS})
    return study.report("Nats a token by tokens of text. Made by `examples/beyond_window.py` of hf_xent.")


if __name__ == "__main__":
    typer.run(main)
