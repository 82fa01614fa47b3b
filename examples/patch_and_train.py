"""Fine-tune any causal LM without logits, in ten lines: `python examples/patch_and_train.py [MODEL] [LOSS]`.

MODEL is 'smollm2' (in a package, offline; the default), a Hub id or a path; LOSS is one that `hf-xent losses` lists.
"""

import sys

import hf_xent
from hf_xent import data
from hf_xent.models import loading


def main(model_name: str = "smollm2", loss: str = "cross_entropy", steps: int = 3) -> list[float]:
    """Trains on CPython's own documentation and returns the logged losses."""
    model, tokenizer = loading.load(model_name)
    blocks = data.pack(data.load_text("pydoc", split="train[:10%]"), tokenizer, block_size=64)
    config = hf_xent.XentConfig(
        output_dir="out/example",
        loss=loss,
        max_steps=steps,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
    )
    trainer = hf_xent.XentTrainer(model, config, train_dataset=blocks)
    trainer.train()
    print(hf_xent.patching.patch_state(model))  # how often the loss was streamed, and how often logits were computed
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(*sys.argv[1:])
