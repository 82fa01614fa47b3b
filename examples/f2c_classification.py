"""Train a language model to give one answer in all formats of a question (F2C); compare with baselines, with spread.

    python examples/f2c_classification.py [--model smollm2] [--steps 6] [--seeds 3] [--output out/f2c]

Items: cities of three continents (the time zone database; no download), each in five formats with different words for
the answers. Training uses no labels. Measured on held-out cities: how often formats agree, F1 and its spread over
formats, accuracy, and how often each continent is the answer, beside the results of the best constant predictor, which
agrees with itself perfectly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import typer

from hf_xent import F2CConfig, F2CTrainer, data
from hf_xent.data import Format, PromptFormats
from hf_xent.experiments.study import Study
from hf_xent.models import loading

CONTINENTS, PEOPLE = ("Africa", "America", "Asia"), ("African", "American", "Asian")
FORMATS = PromptFormats(
    Format("{city} is in {country}. Its people call themselves", tuple(f"{name}s" for name in PEOPLE)),
    Format("{city}, a city in {country}, has the flavors of", tuple(f"{name} cooking" for name in PEOPLE)),
    Format("The {country} city of {city} is one of the largest cities in", CONTINENTS),
    Format("Which part of the world is {country} in?", CONTINENTS),
    Format("{country} is a country in", CONTINENTS),
)
ARMS = {"untrained": None, "F2C": "f2c", "CCE alone": "cce", "swarm": "swarm"}
CONSTANT = "constant predictor"
SHARES = {f"predicted_{i}": name for i, name in enumerate(CONTINENTS)}
METRICS = ("agreement", "f1", "f1_spread", "accuracy", "vote_accuracy", *CONTINENTS)
HELD_OUT = 40


def run(arm: str, seed: int, model_name: str, steps: int, output: Path) -> dict[str, float]:
    """The consistency of an arm under a seed, which also selects the held-out cities."""
    model, tokenizer = loading.load(model_name)
    cities = data.load("cities", split="train").filter(lambda row: row["continent"] in CONTINENTS)
    parts = FORMATS.build(cities, tokenizer, chat=False).train_test_split(test_size=HELD_OUT, seed=seed)
    config = F2CConfig(
        output_dir=str(output / "run"), method=ARMS[arm] or "f2c", max_steps=steps, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, per_device_eval_batch_size=4, learning_rate=5e-4, lr_scheduler_type="cosine",
        seed=seed, logging_steps=1, save_strategy="no", report_to="none",
    )  # fmt: skip
    adapter = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    trainer = F2CTrainer(
        peft.get_peft_model(model, adapter), config, train_dataset=parts["train"], eval_dataset=parts["test"],
        processing_class=tokenizer,
    )  # fmt: skip
    if ARMS[arm]:
        trainer.train()
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    return {SHARES.get(name, name): value for name, value in metrics.items()}


def main(model: str = "smollm2", steps: int = 6, seeds: int = 3, output: Path = Path("out/f2c")) -> dict[str, Any]:
    """Every arm under every seed; returns the metrics by arm and seed."""
    settings = {"model": model, "steps": steps, "items a step": 8}
    study = Study("Consistent classification", METRICS, "untrained", output, seeds, settings)
    for arm, seed in study.runs(ARMS):
        metrics = run(arm, seed, model, steps, output)
        study.record(arm, seed, **metrics)
        if not ARMS[arm]:
            best = {"f1": metrics["constant_f1"], "accuracy": metrics["constant_accuracy"]}
            study.record(CONSTANT, seed, agreement=1.0, f1_spread=0.0, **best)
    return study.report("Made by `examples/f2c_classification.py` of hf_xent.", base_model=model)


if __name__ == "__main__":
    typer.run(main)
