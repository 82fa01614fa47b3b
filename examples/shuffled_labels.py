"""Short SFT and DPO with LoRA on the task of noisy_preferences.py, and a control on labels that say nothing.

Shuffled are the answers among the prompts for SFT; for DPO, each pair is swapped if a coin says so.
"""

from __future__ import annotations

import random
from typing import Any

import peft
import torch
from datasets import Dataset
from noisy_preferences import pairs

from hf_xent import SPCEConfig, SPCETrainer
from hf_xent.trainers import StreamedSFTConfig, StreamedSFTTrainer

BATCH = 4


def answers(count: int, seed: int, shuffled: bool) -> Dataset:
    """Prompts with chosen answers, or with those of other prompts."""
    rows = pairs(count, seed, held_out=False)
    chosen = list(rows["chosen"])
    completions = random.Random(seed).sample(chosen, count) if shuffled else chosen
    return Dataset.from_dict({"prompt": rows["prompt"][:], "completion": completions})


def preferences(count: int, seed: int, shuffled: bool) -> Dataset:
    """Pairs of answers, the annotator's choice first, or either first by a coin."""
    rng, rows = random.Random(seed), pairs(count, seed, held_out=False)
    both = zip(rows["chosen"], rows["rejected"], strict=True)
    chosen, rejected = zip(*[pair[::-1] if shuffled and rng.random() < 0.5 else pair for pair in both], strict=True)
    return Dataset.from_dict({"prompt": rows["prompt"][:], "chosen": chosen, "rejected": rejected})


METHODS: dict[str, Any] = {
    "SFT": (StreamedSFTTrainer, StreamedSFTConfig, answers, {}),
    "DPO": (SPCETrainer, SPCEConfig, preferences, {"beta": 0.3, "precompute_ref_log_probs": True}),
}


def tuned(method: str, shuffled: bool, model: Any, tokenizer: Any, **options: Any) -> tuple[Any, float]:
    """The trained model, and its mean loss in the last quarter of the steps; options are of the configuration."""
    trainer_class, config, rows, others = METHODS[method]
    steps, seed = options["max_steps"], options["seed"]
    last = list(range(model.config.num_hidden_layers * 2 // 3, model.config.num_hidden_layers))
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"], layers_to_transform=last)
    torch.manual_seed(seed)  # for the adapter's initial weights
    arguments = config(
        per_device_train_batch_size=BATCH, learning_rate=1e-3, logging_steps=max(1, steps // 4), save_strategy="no",
        report_to="none", use_cpu=True, bf16=False, lr_scheduler_type="constant", gradient_checkpointing=False,
        **options, **others,
    )  # fmt: skip
    train = rows(steps * BATCH, seed, shuffled)
    trainer = trainer_class(model, args=arguments, train_dataset=train, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    return trainer.model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
