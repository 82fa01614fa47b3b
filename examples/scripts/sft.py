# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-xent[train]"]
# ///
"""Fine-tune a language model on texts or chats under any loss, without logits.

    uv run sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset trl-lib/Capybara --loss focal:gamma=2
    hf jobs uv run --flavor a10g-small --secrets HF_TOKEN sft.py --push-to-hub USER/NAME

DATASET is a Hub id or a folder with JSON lines; its columns are those of TRL: `text`, `messages`, or `prompt` and
`completion`.
"""

import torch
import typer
from datasets import load_dataset
from peft import LoraConfig

from hf_xent.trainers import StreamedSFTConfig, StreamedSFTTrainer


def main(  # noqa: PLR0913  one argument per command-line option
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    dataset: str = "trl-lib/Capybara",
    split: str = "train",
    loss: str = "cross_entropy",
    tail: float = 0.0,
    max_steps: int = 200,
    batch_size: int = 4,
    learning_rate: float = 2e-4,
    max_length: int = 1024,
    lora: int = 16,
    output: str = "out/sft",
    push_to_hub: str = "",
) -> list[float]:
    """Train LoRA adapters (or all weights with --lora 0), save them, and print the losses."""
    config = StreamedSFTConfig(
        output_dir=output,
        loss=loss,
        tail=tail,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=max_length,
        bf16=torch.cuda.is_available(),
        hub_model_id=push_to_hub or None,
        logging_steps=min(10, max_steps),
        report_to="none",
    )
    adapter = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear") if lora else None
    rows = load_dataset(dataset, split=split)
    trainer = StreamedSFTTrainer(model, config, train_dataset=rows, peft_config=adapter)
    trainer.train()
    trainer.save_model()
    if push_to_hub:
        trainer.push_to_hub()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(losses)
    return losses


if __name__ == "__main__":
    typer.run(main)
