"""Fine-tune a language model under EMO, its baselines TaiLr and MixCE, and plain cross-entropy; compare, with spread.

    python examples/emo_lm.py [--model smollm2] [--steps 20] [--seeds 3] [--output out/emo]

Text: CPython's documentation (no download). Perplexity, mean entropy and accuracy are of held-out blocks; distinct-2
and rep-4 are of unbiased samples that continue the first half of each. A model of lower entropy repeats itself more, so
the cross-entropy model is sampled twice: at temperature 1, and at the temperature that gives it EMO's entropy. MAUVE,
the authors' metric, is not reliable for 16 samples; `hf_xent.metrics.diversity.mauve` computes it for a thousand."""

from pathlib import Path
from typing import Any

import torch
import typer

import hf_xent
from hf_xent import data
from hf_xent.experiments.study import Study
from hf_xent.generation import sampling
from hf_xent.metrics.diversity import distinct, repetition
from hf_xent.models import loading

ARMS = {
    "cross-entropy": "cross_entropy",
    "EMO": "emo",
    "TaiLr": "tailr:gamma=1e-5, w_min=0.2",
    "MixCE": "mixce:eta=0.3",
}
CONTROL = "cross-entropy at EMO's entropy"
METRICS = ("perplexity", "entropy", "accuracy", "distinct-2", "rep-4")
BLOCK, HELD_OUT, PROMPTS, NEW = 64, 32, 16, 32


def train(loss: str, model_name: str, steps: int, seed: int, output: Path) -> hf_xent.EMOTrainer:
    """The trainer of a trained model, with held-out blocks for evaluation."""
    model, tokenizer = loading.load(model_name)
    blocks = data.pack(data.load_text("pydoc", split="train[:20%]"), tokenizer, block_size=BLOCK)
    parts = blocks.train_test_split(test_size=HELD_OUT, seed=seed)
    config = hf_xent.EMOConfig(
        output_dir=str(output / "run"), loss=loss, max_steps=steps, per_device_train_batch_size=4,
        per_device_eval_batch_size=HELD_OUT, learning_rate=3e-5, seed=seed, logging_steps=5, save_strategy="no",
        report_to="none", lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = hf_xent.EMOTrainer(model, config, train_dataset=parts["train"], eval_dataset=parts["test"])
    trainer.train()
    return trainer


def scores(trainer: hf_xent.EMOTrainer) -> dict[str, float]:
    """The metrics of an evaluation on the held-out blocks."""
    metrics = trainer.evaluate()
    names = {"perplexity": "perplexity", "entropy": "entropy", "accuracy": "mean_token_accuracy"}
    return {name: metrics[f"eval_{logged}"] for name, logged in names.items()}


def diversity(model: Any, blocks: torch.Tensor, seed: int, temperature: float = 1.0) -> dict[str, float]:
    """distinct-2 and rep-4 of continuations of the blocks' first halves."""
    samples = sampling.sample(model, blocks[:PROMPTS, : BLOCK // 2], tokens=NEW, seed=seed, temperature=temperature)
    return {"distinct-2": distinct(samples, 2), "rep-4": repetition(samples, 4)}


def main(model: str = "smollm2", steps: int = 20, seeds: int = 3, output: Path = Path("out/emo")) -> dict[str, Any]:
    """Every arm under every seed; returns the metrics by arm and seed."""
    settings = {"model": model, "steps": steps, "tokens a step": f"4 x {BLOCK}"}
    study = Study("Fine-tuning under EMO", METRICS, "cross-entropy", output, seeds, settings)
    for arm, seed in study.runs([*ARMS, CONTROL]):
        trainer = train(ARMS[arm if arm in ARMS else "cross-entropy"], model, steps, seed, output)
        blocks = torch.tensor(trainer.eval_dataset["input_ids"])
        if arm in ARMS:
            metrics, temperature = scores(trainer), 1.0
        else:  # the temperature changes the samples, not the model's other metrics
            metrics = {"entropy": study.values("EMO", "entropy")[seed]}
            temperature = sampling.temperature_at(trainer.model.eval(), blocks, metrics["entropy"])
        study.record(arm, seed, **metrics, **diversity(trainer.model.eval(), blocks, seed, temperature))
    return study.report("Made by `examples/emo_lm.py` of hf_xent.", base_model=model)


if __name__ == "__main__":
    typer.run(main)
