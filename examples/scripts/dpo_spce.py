# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-xent[train]"]
# ///
"""Train on preferences with a probability for every pair: SPCE, which is DPO where all probabilities are 1.

    uv run dpo_spce.py --dataset USER/PAIRS --method pso --push-to-hub USER/NAME

DATASET is a Hub id or a folder with JSON lines; its columns are those of TRL's DPO (`prompt`, `chosen`, `rejected`),
and it may have `preference_prob`: the probability from 0 to 1 that `chosen` is the better answer.
"""

import torch
import typer
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_xent import SPCEConfig, SPCETrainer


def main(  # noqa: PLR0913  one argument per command-line option
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    dataset: str = "trl-lib/ultrafeedback_binarized",
    split: str = "train",
    method: str = "spce",
    beta: float = 0.1,
    max_steps: int = 200,
    batch_size: int = 4,
    learning_rate: float = 5e-5,
    lora: int = 16,
    output: str = "out/spce",
    push_to_hub: str = "",
) -> dict[str, float]:
    """Train LoRA adapters, save them, and print the last metrics."""
    config = SPCEConfig(
        output_dir=output,
        method=method,
        beta=beta,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        bf16=torch.cuda.is_available(),
        hub_model_id=push_to_hub or None,
        logging_steps=min(10, max_steps),
        report_to="none",
    )
    trainer = SPCETrainer(
        AutoModelForCausalLM.from_pretrained(model),
        args=config,
        train_dataset=load_dataset(dataset, split=split),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    if push_to_hub:
        trainer.push_to_hub()
    last = [entry for entry in trainer.state.log_history if "rewards/accuracies" in entry]
    metrics = {name: value for name, value in (last[-1] if last else {}).items() if name.startswith("rewards/")}
    print(metrics)
    return metrics


if __name__ == "__main__":
    typer.run(main)
