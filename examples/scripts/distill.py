# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-xent[train]"]
# ///
"""Distill a language model into a smaller one, without the logits of either.

    uv run distill.py --teacher HuggingFaceTB/SmolLM2-360M-Instruct --objective jsd:beta=0.5 --push-to-hub USER/NAME

DATASET is a Hub id or a folder with JSON lines; its columns are those of TRL's SFT. A share ON_POLICY of the batches is
sampled by the student, for which rows need a `prompt` and a `completion`, or a chat.
"""

import torch
import typer
from datasets import load_dataset

from hf_xent import DistillationConfig, DistillationTrainer


def main(  # noqa: PLR0913  one argument per command-line option
    student: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    teacher: str = "HuggingFaceTB/SmolLM2-360M-Instruct",
    dataset: str = "trl-lib/Capybara",
    split: str = "train",
    objective: str = "forward_kl",
    ce_weight: float = 0.0,
    on_policy: float = 0.0,
    max_steps: int = 200,
    batch_size: int = 4,
    learning_rate: float = 1e-4,
    max_length: int = 1024,
    output: str = "out/distilled",
    push_to_hub: str = "",
) -> list[float]:
    """Train all weights of the student, save it, and print the losses."""
    config = DistillationConfig(
        output_dir=output,
        objective=objective,
        ce_weight=ce_weight,
        on_policy=on_policy,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=max_length,
        bf16=torch.cuda.is_available(),
        hub_model_id=push_to_hub or None,
        logging_steps=min(10, max_steps),
        report_to="none",
    )
    trainer = DistillationTrainer(student, teacher, config, train_dataset=load_dataset(dataset, split=split))
    trainer.train()
    trainer.save_model()
    if push_to_hub:
        trainer.push_to_hub()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(losses)
    return losses


if __name__ == "__main__":
    typer.run(main)
