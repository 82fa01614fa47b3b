"""Preference tuning with annotators who err: DPO, cDPO and SPO use the labels; SPCE and PSO also their probabilities.

    python examples/spo_dpo.py [--model smollm2] [--steps 6] [--seeds 3] [--output out/spo]

The task is that of noisy_preferences.py: to explain a Python topic in at most 4 or 8 words, with a known probability
that an answer wins. Measured on held-out topics against the truth: accuracy of the margin's sign, the mean squared
distance of sigmoid(beta Delta) from the true probability, and the length of greedy answers and how many are within the
limit. Resumable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import typer
from noisy_preferences import answered, judged, pairs

from hf_xent import SPCEConfig, SPCETrainer, SPOConfig, SPOTrainer
from hf_xent.experiments.study import Study
from hf_xent.models import loading

BETA, BATCH, HELD_OUT, PROMPTS, NEW = 0.3, 4, 24, 8, 16
ARMS: dict[str, dict[str, Any]] = {
    "DPO": {}, "SPCE": {}, "cDPO": {}, "PSO": {"method": "pso"}, "SPO": {"gamma_w": 0.2, "gamma_l": 0.0},
}  # fmt: skip
CONTROL = "untrained"
METRICS = ("accuracy", "squared error", "margin size", "words", "within limit")


def trainer_of(arm: str, model_name: str, steps: int, seed: int, output: Path) -> Any:
    """The trainer of an arm; only SPCE and PSO see the probabilities."""
    train, test = pairs(steps * BATCH, seed, held_out=False), pairs(HELD_OUT, seed, held_out=True)
    options = dict(ARMS.get(arm, {}))
    if arm == "cDPO":  # the expected share of wrong labels, which is unknown in practice
        options["label_smoothing"] = sum(min(p, 1 - p) for p in train["preference_prob"]) / len(train)
    if arm not in ("SPCE", "PSO"):
        train = train.remove_columns("preference_prob")
    model, tokenizer = loading.load(model_name)
    last = list(range(model.config.num_hidden_layers * 2 // 3, model.config.num_hidden_layers))
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"], layers_to_transform=last)
    trainer_class, config = (SPOTrainer, SPOConfig) if arm == "SPO" else (SPCETrainer, SPCEConfig)
    arguments = config(
        output_dir=str(output / arm), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=3e-3, beta=BETA,
        per_device_eval_batch_size=8, seed=seed, logging_steps=5, save_strategy="no", report_to="none", use_cpu=True,
        bf16=False, lr_scheduler_type="constant", precompute_ref_log_probs=True, gradient_checkpointing=False,
        **options,
    )  # fmt: skip
    torch.manual_seed(seed)  # for the adapter's initial weights
    parts = {"train_dataset": train, "eval_dataset": test, "processing_class": tokenizer, "peft_config": lora}
    return trainer_class(model, args=arguments, **parts)


def main(model: str = "smollm2", steps: int = 6, seeds: int = 3, output: Path = Path("out/spo")) -> dict[str, Any]:
    """Every arm under every seed, and the untrained model; returns the metrics by arm and seed."""
    settings = {"model": model, "steps": steps, "pairs a step": BATCH, "beta": BETA, "held-out pairs": HELD_OUT}
    study = Study("Noisy preferences", METRICS, "DPO", output, seeds=seeds, settings=settings)
    for arm, seed in study.runs([*ARMS, CONTROL]):
        trainer = trainer_of(arm, model, steps, seed, output)
        if arm != CONTROL:
            trainer.train()
        trainer.model.eval()
        rows = trainer.eval_dataset.select(range(PROMPTS))
        metrics = judged(trainer) | answered(trainer.model, trainer.processing_class, rows, NEW)
        if arm == CONTROL:
            del metrics["accuracy"]  # margins of 0 have only the sign of rounding errors
        study.record(arm, seed, **metrics)
    return study.report("Made by `examples/spo_dpo.py` of hf_xent.", base_model="HuggingFaceTB/SmolLM2-135M-Instruct")


if __name__ == "__main__":
    typer.run(main)
