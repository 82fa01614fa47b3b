"""A small GPT-2 that is pre-trained on texts in a minute on one core, and further training from there.

lm = SmallLM(texts, 512_000, seed=0, folder=Path("out/base"))       # the tokenizer and the model are kept in the folder
model = lm.trained(more_texts, tokens=32_768)
print(lm.loss(lm.model(), held_out), lm.loss(model, held_out))
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from datasets import Dataset
from pretrain_gpt2 import train_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

import hf_xent
from hf_xent import data

BLOCK, ROWS, BASE_RATE, RATE = 128, 4, 3e-3, 1e-3
SIZE = {"n_layer": 2, "n_embd": 128, "n_head": 4, "n_positions": BLOCK, "activation_function": "gelu_pytorch_tanh"}


class SmallLM:
    """Pre-trained on the first `tokens` tokens of the texts, unless the folder has a model; the seed is of all runs."""

    def __init__(self, texts: list[str], tokens: int, seed: int, folder: Path):
        self.seed, self.folder = seed, folder
        if not (folder / "config.json").exists():
            self.tokenizer = train_tokenizer(texts)
            set_seed(seed)
            ends = {"bos_token_id": self.tokenizer.eos_token_id, "eos_token_id": self.tokenizer.eos_token_id}
            model = GPT2LMHeadModel(GPT2Config(vocab_size=len(self.tokenizer), **ends, **SIZE))
            self.tokenizer.save_pretrained(folder)
            self._train(model, self.blocks(texts, tokens), BASE_RATE, 1).save_pretrained(folder)
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def model(self) -> GPT2LMHeadModel:
        """The pre-trained model."""
        return GPT2LMHeadModel.from_pretrained(self.folder)

    def blocks(self, texts: list[str], tokens: int | None = None) -> Dataset:
        """The texts as blocks, `tokens` in all if that is given."""
        packed = data.pack(Dataset.from_dict({"text": texts}), self.tokenizer, BLOCK)
        return packed if tokens is None else packed.select(range(min(len(packed), tokens // BLOCK)))

    def trained(self, texts: list[str], tokens: int | None = None, epochs: int = 1) -> Any:
        """The pre-trained model, trained further."""
        return self._train(self.model(), self.blocks(texts, tokens), RATE, epochs)

    def loss(self, model: Any, texts: list[str]) -> float:
        """Mean over the predicted tokens of blocks, nats."""
        config = hf_xent.XentConfig(output_dir=str(self.folder), per_device_eval_batch_size=16, report_to="none")
        return math.log(hf_xent.XentTrainer(model, config).evaluate(self.blocks(texts))["eval_perplexity"])

    def _train(self, model: Any, rows: Dataset, rate: float, epochs: int) -> Any:
        config = hf_xent.XentConfig(
            output_dir=str(self.folder), num_train_epochs=epochs, per_device_train_batch_size=ROWS, learning_rate=rate,
            warmup_steps=5, seed=self.seed, save_strategy="no", report_to="none", logging_steps=1000,
        )  # fmt: skip
        hf_xent.XentTrainer(model, config, train_dataset=rows).train()
        return hf_xent.unpatch(model)
