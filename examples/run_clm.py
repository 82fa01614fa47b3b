"""A plain transformers training script, and the two lines that make its loss stream (both marked `hf_xent`).

    python examples/run_clm.py --model_name_or_path MODEL --train_file TEXT --output_dir out/run_clm --max_steps 100

MODEL is a Hub id or a path, TEXT a text file. All options of `transformers.TrainingArguments` are accepted.
"""

import math
from dataclasses import dataclass, field

import datasets
import transformers
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

import hf_xent  # hf_xent: the first line


@dataclass
class ScriptArguments:
    """What is trained on what."""

    model_name_or_path: str = field(metadata={"help": "Hub id or path of a causal LM."})
    train_file: str = field(metadata={"help": "Text to train on; its last twentieth is for evaluation."})
    block_size: int = field(default=256, metadata={"help": "Tokens a row."})


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate, save; returns the evaluation's metrics."""
    parser = transformers.HfArgumentParser((ScriptArguments, TrainingArguments))
    script, training = parser.parse_args_into_dataclasses(arguments)
    transformers.set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(script.model_name_or_path)
    hf_xent.patch(model)  # hf_xent: the second line

    def blocks(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = [i for text in rows["text"] for i in tokenizer(text)["input_ids"]]
        size = script.block_size
        parts = [ids[i : i + size] for i in range(0, len(ids) // size * size, size)]
        return {"input_ids": parts, "labels": [list(part) for part in parts]}

    text = datasets.load_dataset("text", data_files=script.train_file, split="train")
    with training.main_process_first(desc="tokenize"):  # the other ranks read its cache
        rows = text.map(blocks, batched=True, batch_size=None, remove_columns="text")
    parts = rows.train_test_split(test_size=0.05, seed=training.seed)
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    metrics["perplexity"] = math.exp(metrics["eval_loss"])
    trainer.log_metrics("eval", metrics)
    return metrics


if __name__ == "__main__":
    main()
    # End the process group explicitly, after the trainer is deleted: one that is freed last by its model waits for a
    # thread that may wait for the interpreter, and one that outlives the interpreter may abort.
    PartialState().destroy_process_group()
