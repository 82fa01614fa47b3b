"""Remove the RMSNorms of the last layers of SmolLM2-135M, against plain fine-tuning of the same layers: a partial run.

    python examples/ln_free_smollm2.py [--layers 4] [--steps 50] [--text pydoc] [--output out/ln-free-smollm2]

Only the last layers train, and only their norms (MLP, then queries and keys, then values, layer by layer) and the final
one go: what a CPU reaches. One seed. Losses are of held-out blocks of the text.
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
from hf_xent.ln_free import Schedule

BLOCK, ROWS, HELD_OUT = 64, 4, 48


def schedule_of(model: Any, layers: int, steps: int) -> Schedule:
    """The proportions of the scaled schedule, for the last layers and the final norm."""
    sites = [site for site in ln_free.sites(model) if site.layer is None or site.layer >= first_layer(model, layers)]
    step = steps / (3 * len(sites))  # done after a third of the steps, as there
    return Schedule.of([site.name for site in sites], max(1, steps / 15), (step, step, step))


def first_layer(model: Any, layers: int) -> int:
    """The first of the last layers."""
    return model.config.num_hidden_layers - layers


def run(removing: bool, name: str, layers: int, steps: int, text: str, output: Path) -> dict[str, Any]:
    """Held-out loss before and after, attribution error, and the training losses."""
    model, tokenizer = embedded.load(name)
    parts = data.pack(data.load_text(text), tokenizer, block_size=BLOCK).train_test_split(HELD_OUT, seed=0)
    held_out = torch.tensor(list(parts["test"]["input_ids"]))
    before = ln_free.analyze(model, held_out)
    for parameter in (*model.parameters(),):
        parameter.requires_grad = False
    last = model.base_model.layers[first_layer(model, layers) :]
    for parameter in (*last.parameters(), *model.base_model.norm.parameters()):
        parameter.requires_grad = True
    shared: dict[str, Any] = {
        "output_dir": str(output / "run"), "max_steps": steps, "per_device_train_batch_size": ROWS, "report_to": "none",
        "learning_rate": 1e-4, "warmup_steps": 3, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    if removing:
        ln_free.wrap(model)
        trainer: Any = hf_xent.LNRemovalTrainer(
            model,
            hf_xent.LNRemovalConfig(**shared),
            schedule=schedule_of(model, layers, steps),
            train_dataset=parts["train"],
        )
    else:
        trainer = hf_xent.XentTrainer(model, hf_xent.XentConfig(**shared), train_dataset=parts["train"])
    trainer.train()
    after = ln_free.analyze(model, held_out)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {"before": before.as_dict(), "after": after.as_dict(), "losses": losses}


def main(
    model: str = "smollm2", layers: int = 4, steps: int = 50, text: str = "pydoc",
    output: Path = Path("out/ln-free-smollm2"),
) -> dict[str, Any]:  # fmt: skip
    """Both arms; what is there already is not run again."""
    output.mkdir(parents=True, exist_ok=True)
    found = {}
    for arm, removing in (("vanilla", False), ("norms removed", True)):
        file = output / f"{arm}.json"
        if not file.exists():
            file.write_text(json.dumps(run(removing, model, layers, steps, text, output)))
        found[arm] = json.loads(file.read_text())
        rows = {when: found[arm][when] for when in ("before", "after")}
        show(arm, {when: {k: row[k] for k in ("loss", "entropy", "ece", "mean_nmae")} for when, row in rows.items()})
    return found


if __name__ == "__main__":
    typer.run(main)
