"""Remove every RMSNorm of SmolLM2-135M, against plain fine-tuning and against removal without what it takes there.

    python examples/ln_free_smollm2.py [--steps 480] [--text pydoc] [--output out/ln-free-smollm2]

From layer 12 on the first token's residual is some 170 times as long as the others', so that no divisor serves both,
and one gated MLP after the other squares it. So divisors are made alike, by `spread_weight`, and all norms fade
together. All weights train. One seed. Losses are of held-out blocks; the models are saved for `hf-xent ln-free`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import typer
from rich import print as show

import hf_xent
from hf_xent import data, embedded, ln_free

BLOCK, ROWS, HELD_OUT = 64, 8, 96  # short ones: the term needs many first tokens
FADE = {"schedule": "at_once", "removal_start": 1 / 8, "removal_taper": 0.7, "sigma_weight": 0.0}
ARMS: dict[str, Any] = {
    "original": None,
    "vanilla": None,
    "LN-free": {**FADE, "spread_weight": 100.0},
    "LN-free, no spread term": FADE,
    "LN-free, no fading": {"spread_weight": 100.0, "sigma_weight": 0.0},
}
"""Arm -> options of LNRemovalConfig."""


def trainer_of(arm: str, model: Any, tokenizer: Any, blocks: Any, steps: int, output: Path) -> Any:
    shared: dict[str, Any] = {
        "output_dir": str(output / "run"), "max_steps": steps, "per_device_train_batch_size": ROWS,
        "learning_rate": 2e-4, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 5e-5},
        "warmup_steps": min(10, steps // 2), "logging_steps": 10, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "bf16": True, "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip
    rows = {"train_dataset": blocks, "processing_class": tokenizer}
    if arm == "vanilla":
        return hf_xent.XentTrainer(model, hf_xent.XentConfig(**shared), **rows)
    return hf_xent.LNRemovalTrainer(model, hf_xent.LNRemovalConfig(**shared | ARMS[arm]), **rows)


def run(arm: str, model: Any, tokenizer: Any, parts: Any, steps: int, output: Path) -> dict[str, Any]:
    """Fine-tune, save, measure; where a sigma is infinite, the step at which it was to be frozen."""
    if arm != "original":
        trainer = trainer_of(arm, model, tokenizer, parts["train"], steps, output)
        try:
            trainer.train()
        except ValueError as error:
            return {"diverged": trainer.state.global_step, "error": str(error)}
        trainer.save_model(str(output / arm))
    held_out = torch.tensor(list(parts["test"][:HELD_OUT]["input_ids"]))
    row = ln_free.analyze(model, held_out).as_dict()
    if "LN-free" in arm:
        row |= {form.__name__: ln_free.parity(model, form(model)) for form in (ln_free.to_true, ln_free.to_eps_trick)}
    return row


def main(
    model: str = "smollm2", steps: int = 480, text: str = "pydoc", output: Path = Path("out/ln-free-smollm2")
) -> dict[str, Any]:
    """All arms; what is there already is not run again."""
    output.mkdir(parents=True, exist_ok=True)
    for arm in ARMS:
        file = output / f"{arm}.json"
        if not file.exists():
            loaded, tokenizer = embedded.load(model)
            parts = data.pack(data.load_text(text), tokenizer, block_size=BLOCK).train_test_split(HELD_OUT, seed=0)
            file.write_text(json.dumps(run(arm, loaded, tokenizer, parts, steps, output)))
        show(arm, {name: x for name, x in json.loads(file.read_text()).items() if name != "nmae"})
    return {arm: json.loads((output / f"{arm}.json").read_text()) for arm in ARMS}


if __name__ == "__main__":
    typer.run(main)
