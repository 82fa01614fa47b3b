"""Remove every RMSNorm of SmolLM2-135M by fine-tuning; compare with plain fine-tuning.

    python examples/ln_free_smollm2.py [--steps 480] [--text pydoc] [--output out/ln-free-smollm2]

The first token's residual is some 170 times as long as the others', and each gated MLP squares it. Therefore every
block begins with the same token, `spread_weight` makes the divisors alike, and all norms fade out together. One seed.
"""

import json
from pathlib import Path
from typing import Any

import torch
import typer
from rich import print as show

import hf_xent
from hf_xent import data, ln_free
from hf_xent.models import loading

BLOCK, ROWS, HELD_OUT = 64, 8, 96
REMOVAL = {
    "schedule": "at_once", "removal_start": 1 / 8, "removal_taper": 0.7, "sigma_weight": 0.0, "sigma_median": True,
    "spread_weight": 100.0, "spread_limit": 0.05,
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {"original": {}, "vanilla": {}, "LN-free": REMOVAL}


def blocks(text: str, tokenizer: Any) -> Any:
    """Train and test sets: blocks of a BOS token and BLOCK - 1 tokens."""
    packed = data.pack(data.load_text(text), tokenizer, block_size=BLOCK - 1)
    with_bos = packed.map(lambda row: {name: [tokenizer.bos_token_id, *row[name]] for name in ("input_ids", "labels")})
    return with_bos.train_test_split(HELD_OUT, seed=0)


def trainer_of(arm: str, model: Any, tokenizer: Any, rows: Any, steps: int, output: Path) -> Any:
    shared: dict[str, Any] = {
        "output_dir": str(output / "run"), "max_steps": steps, "per_device_train_batch_size": ROWS,
        "learning_rate": 2e-4, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 5e-5},
        "adam_beta2": 0.95, "warmup_steps": 10, "logging_steps": 10, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "bf16": True, "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip
    trainer_class = hf_xent.LNRemovalTrainer if ARMS[arm] else hf_xent.XentTrainer
    args = trainer_class.config_class(**shared | ARMS[arm])
    return trainer_class(model, args, train_dataset=rows, processing_class=tokenizer)


def run(arm: str, model: Any, tokenizer: Any, parts: Any, steps: int, output: Path) -> dict[str, Any]:
    """Fine-tunes, saves and measures an arm; if the training diverges, returns the step at which it did."""
    if arm != "original":
        trainer = trainer_of(arm, model, tokenizer, parts["train"], steps, output)
        try:
            trainer.train()
        except ValueError as error:
            return {"diverged": trainer.state.global_step, "error": str(error)}
        trainer.save_model(str(output / arm))
    held_out = torch.tensor(list(parts["test"][:HELD_OUT]["input_ids"]))
    row = ln_free.analyze(model, held_out).as_dict()
    if ARMS[arm]:
        row["true"] = ln_free.parity(model, ln_free.to_true(model, held_out[:8]), held_out[:8])
        row["eps trick"] = ln_free.parity(model, ln_free.to_eps_trick(model), held_out[:8])
    return row


def main(
    model: str = "smollm2", steps: int = 480, text: str = "pydoc", output: Path = Path("out/ln-free-smollm2")
) -> dict[str, Any]:
    output.mkdir(parents=True, exist_ok=True)
    files = {arm: output / f"{arm}.json" for arm in ARMS}
    for arm, file in files.items():
        if not file.exists():
            loaded, tokenizer = loading.load(model)
            file.write_text(json.dumps(run(arm, loaded, tokenizer, blocks(text, tokenizer), steps, output)))
        show(arm, {name: x for name, x in json.loads(file.read_text()).items() if name != "nmae"})
    return {arm: json.loads(file.read_text()) for arm, file in files.items()}


if __name__ == "__main__":
    typer.run(main)
