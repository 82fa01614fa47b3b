"""Fine-tune a language model on questions under NoiseFiT, its baselines and its control; compare, with spread.

    python examples/noisefit_qa.py [--model smollm2] [--data cities] [--steps 12] [--seeds 3] [--output out/noisefit]

The questions and the metrics of samples are those of short_answers.py; `--data` may name any data with the columns
`question` and `answer`. The authors' adapter is trained on part of the questions, the others are held out. `nll` is
that of held-out answers, per token. `divergence` is KL(clean || noisy) per token in training; dropout alone causes
some, so compare it with that of the control with sigma 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import typer
from short_answers import answers, questions
from transformers import DataCollatorForSeq2Seq

from hf_xent import NoiseFiTTrainer, XentTrainer
from hf_xent.experiments.study import Study
from hf_xent.models import loading
from hf_xent.trainers.noisefit import lora_config

ARMS: dict[str, tuple[type[XentTrainer], dict[str, Any]]] = {
    "cross-entropy": (XentTrainer, {}),
    "NEFTune": (XentTrainer, {"neftune_noise_alpha": 5.0}),
    "R-Drop": (NoiseFiTTrainer, {"method": "rdrop"}),
    "NoiseFiT, sigma 0": (NoiseFiTTrainer, {"noise_std": 0.0}),
    "NoiseFiT": (NoiseFiTTrainer, {}),
}
METRICS = ("nll", "accuracy", "consistency", "divergence")
HELD_OUT = 40


def run(arm: str, seed: int, model_name: str, source: str, steps: int, output: Path) -> dict[str, float]:
    """The metrics of an arm under a seed, which draws the held-out questions too."""
    model, tokenizer = loading.load(model_name)
    parts = questions(source, tokenizer).train_test_split(test_size=HELD_OUT, seed=seed)
    kind, options = ARMS[arm]
    config = kind.config_class(
        output_dir=str(output / "run"), max_steps=steps, per_device_train_batch_size=8, gradient_accumulation_steps=1,
        per_device_eval_batch_size=HELD_OUT, learning_rate=1e-3, lr_scheduler_type="cosine", seed=seed,
        logging_steps=steps, save_strategy="no", report_to="none", **options,
    )  # fmt: skip
    trainer = kind(
        peft.get_peft_model(model, lora_config()), config, train_dataset=parts["train"], eval_dataset=parts["test"],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )  # fmt: skip
    trainer.train()
    logs = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    metrics = {"nll": trainer.evaluate()["eval_loss"]} | {k: logs[k] for k in METRICS if k in logs}
    return metrics | answers(trainer.model.eval(), tokenizer, parts["test"], seed)


def main(
    model: str = "smollm2", data: str = "cities", steps: int = 12, seeds: int = 3, output: Path = Path("out/noisefit")
) -> dict[str, Any]:
    """Every arm under every seed; returns the metrics by arm and seed."""
    settings = {"model": model, "data": data, "steps": steps, "rows a step": 8}
    study = Study("NoiseFiT on questions", METRICS, "cross-entropy", output, seeds, settings)
    for arm, seed in study.runs(ARMS):
        study.record(arm, seed, **run(arm, seed, model, data, steps, output))
    return study.report("Made by `examples/noisefit_qa.py` of hf_xent.", base_model=model)


if __name__ == "__main__":
    typer.run(main)
