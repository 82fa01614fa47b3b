"""Small translators for noisy_translation.py: made, trained in two stages, and asked.

The models are Pegasus, whose positions are sinusoids. As in tag_models.py, cross-attention starts with equal
projections of queries and keys, so that it looks at like positions, and what a layer adds starts at zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mo_pairs
import torch
from transformers import PegasusConfig, PegasusForConditionalGeneration, set_seed

from hf_xent.data.target_noise import TargetNoise
from hf_xent.trainers import EISLConfig, EISLTrainer

CE = "cross-entropy"
ARMS: dict[str, dict[str, Any]] = {
    CE: {"loss": "cross_entropy"},
    "EISL": {"ce_factor": 0.0},
    "EISL + cross-entropy": {"ce_factor": 1.0},
    "EISL, own inputs": {"ce_factor": 0.0, "own_inputs": 1.0},
    "cross-entropy, own inputs": {"loss": "cross_entropy", "own_inputs": 1.0},
    "GCE": {"loss": "comp_sum:tau=1.7"},
    "label smoothing": {"loss": "cross_entropy:label_smoothing=0.1"},
}
WIDTH, BATCH, NEW = 128, 64, 24


def new(vocabulary: int, seed: int) -> Any:
    """A model of two layers a half with random weights."""
    set_seed(seed)
    each = {"layers": 2, "ffn_dim": 2 * WIDTH, "attention_heads": 4}
    sizes = {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in each.items()}
    ids = {"pad_token_id": mo_pairs.PAD, "eos_token_id": mo_pairs.END, "decoder_start_token_id": mo_pairs.PAD}
    more = {"max_position_embeddings": 64, "init_std": 0.1, "scale_embedding": True, "vocab_size": vocabulary}
    model = PegasusForConditionalGeneration(PegasusConfig(d_model=WIDTH, **sizes, **ids, **more))
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            added = name.endswith(("fc2", "self_attn.out_proj"))
            torch.nn.init.normal_(module.weight, std=0.0 if added else module.in_features**-0.5)
    for layer in model.model.decoder.layers:
        layer.encoder_attn.q_proj.load_state_dict(layer.encoder_attn.k_proj.state_dict())
    return model


def train(arm: str, model: Any, rows: Any, folder: Path, collate: Any = mo_pairs.collate, **options: Any) -> Any:
    """An arm's trainer; the steps of cross-entropy, which all arms share, are run by the first one in a folder."""
    config = EISLConfig(
        output_dir=str(folder), save_steps=options["ce_steps"], per_device_train_batch_size=BATCH,
        warmup_steps=min(50, options["ce_steps"]), lr_scheduler_type="cosine", report_to="none", use_cpu=True,
        dataloader_pin_memory=False, disable_tqdm=True, logging_strategy="no", **options, **ARMS[arm],
    )  # fmt: skip
    trainer = EISLTrainer(model, config, train_dataset=rows, data_collator=collate)
    shared = folder / f"checkpoint-{options['ce_steps']}"
    trainer.train(resume_from_checkpoint=str(shared) if shared.exists() else None)
    return trainer


def translated(model: Any, tokenizer: Any, pairs: mo_pairs.Pairs) -> list[str]:
    """Greedy translations of the sources."""
    batch = mo_pairs.collate([{"input_ids": encoded(tokenizer, text), "labels": []} for text in pairs])
    options: dict[str, Any] = {"max_new_tokens": NEW, "num_beams": 1, "do_sample": False}
    found = model.eval().generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    return [text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]


def worse(pairs: mo_pairs.Pairs, noise: TargetNoise) -> mo_pairs.Pairs:
    return {source: noise.of(target, index) for index, (source, target) in enumerate(pairs.items())}


def rows(tokenizer: Any, pairs: mo_pairs.Pairs) -> list[dict[str, list[int]]]:
    return [{"input_ids": encoded(tokenizer, x), "labels": encoded(tokenizer, y)} for x, y in pairs.items()]


def encoded(tokenizer: Any, text: str) -> list[int]:
    return [*tokenizer(f" {text}")["input_ids"], mo_pairs.END]
