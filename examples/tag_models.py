"""Small encoder-decoders that read words and write their tags (word_tags.py): made, trained and measured.

The models are Pegasus, whose positions are sinusoids; T5 did not learn in this budget which word a tag belongs to. To
learn it sooner, cross-attention starts with equal projections of queries and keys, so that it looks at like positions,
and what a layer adds starts at zero. A loss is that of a tag given all words and the tags before it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import word_tags
from transformers import PegasusConfig, PegasusForConditionalGeneration, set_seed
from word_tags import Row

import hf_xent
from hf_xent.models.contexts import eval_mode
from hf_xent.patching import lazily

WIDTH, HEADS, BATCH, RATE = 32, 2, 64, 4e-3


def new(encoder: int, decoder: int, seed: int) -> Any:
    """An encoder and a decoder of one layer each, whose inner layers have these widths; patched."""
    set_seed(seed)
    sizes = {"encoder_ffn_dim": encoder, "decoder_ffn_dim": decoder, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "d_model": WIDTH, "dropout": 0.0}
    ids = {"pad_token_id": word_tags.PAD, "eos_token_id": word_tags.END, "decoder_start_token_id": word_tags.PAD}
    more = {"vocab_size": word_tags.SIZE, "max_position_embeddings": 32, "init_std": 0.1, "scale_embedding": True}
    model = PegasusForConditionalGeneration(PegasusConfig(**sizes, **heads, **ids, **more))
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            added = name.endswith(("fc2", "self_attn.out_proj"))
            torch.nn.init.normal_(module.weight, std=0.0 if added else module.in_features**-0.5)
    for layer in model.model.decoder.layers:
        layer.encoder_attn.q_proj.load_state_dict(layer.encoder_attn.k_proj.state_dict())
    return hf_xent.patch(model)


def train(model: Any, rows: list[Row], steps: int, seed: int, output: str, **options: Any) -> Any:
    """The model, trained with AdamW; `callbacks` is one of the options, the others are those of XentConfig."""
    defaults = {"learning_rate": RATE, "warmup_steps": 20, "lr_scheduler_type": "cosine"}
    defaults["train_sampling_strategy"] = "group_by_length"  # less padding
    config = hf_xent.XentConfig(
        output_dir=output, max_steps=steps, seed=seed, per_device_train_batch_size=BATCH, save_strategy="no",
        report_to="none", logging_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        **defaults | {name: value for name, value in options.items() if name != "callbacks"},
    )  # fmt: skip
    callbacks = options.get("callbacks")
    hf_xent.XentTrainer(model, config, train_dataset=rows, data_collator=word_tags.collate, callbacks=callbacks).train()
    return model


class Losses(NamedTuple):
    """What tags cost: the sum of each row in nats, [N], its number of tags, [N], and the share that is likeliest."""

    sums: np.ndarray
    tokens: np.ndarray
    accuracy: float

    @property
    def mean(self) -> float:
        """Nats per tag."""
        return float(self.sums.sum() / self.tokens.sum())


def measured(model: Any, rows: list[Row], batch: int = 250) -> Losses:
    """The losses of rows, without logits."""
    sums, right = [], 0.0
    with torch.no_grad(), eval_mode(model), lazily(model):
        for start in range(0, len(rows), batch):
            inputs = word_tags.collate(rows[start : start + batch])
            stats = model(**inputs).logits.stats(inputs["labels"])
            sums.append(torch.where(stats.mask, stats.nll, 0).sum(1).double().numpy())
            right += stats.is_top1.sum().item()
    tokens = np.array([len(row["labels"]) for row in rows])
    return Losses(np.concatenate(sums), tokens, right / tokens.sum())
