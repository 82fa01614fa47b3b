"""Four ways to fine-tune a model on the same batches: with its norms, under LN removal, and two controls.

    curve = tune("LN-free", seed=0, model, blocks, steps=240, Path("out"))          # in place

vanilla keeps the norms; LN-free removes them on the scaled schedule; the controls remove all at once, or on schedule
without the auxiliary loss. The arms differ only in the options in ARMS.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from pretrain_gpt2 import ROWS

import hf_xent

REMOVAL = (hf_xent.LNRemovalTrainer, hf_xent.LNRemovalConfig)
ARMS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "vanilla": (hf_xent.XentTrainer, hf_xent.XentConfig, {}),
    "LN-free": (*REMOVAL, {}),
    "LN-free, all at once": (*REMOVAL, {"schedule": "at_once"}),
    "LN-free, no auxiliary loss": (*REMOVAL, {"sigma_weight": 0.0}),
}


def tune(arm: str, seed: int, model: Any, blocks: Any, steps: int, output: Path) -> list[tuple[int, float]]:
    """Fine-tune a model in place under an arm; cross-entropy of training by step, means of five."""
    kind, config, options = ARMS[arm]
    args = config(
        output_dir=str(output / "run"), max_steps=steps, per_device_train_batch_size=ROWS, seed=seed,
        learning_rate=6e-4, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 3e-4},
        warmup_steps=steps // 12, weight_decay=0.01, logging_steps=5, save_strategy="no", report_to="none",
        disable_tqdm=True, memory_budget=2**25, bf16=True, use_cpu=not torch.cuda.is_available(), **options,
    )  # fmt: skip
    trainer = kind(model, args, train_dataset=blocks)
    trainer.train()
    hf_xent.unpatch(model)
    return [(log["step"], math.log(log["perplexity"])) for log in trainer.state.log_history if "loss" in log]
