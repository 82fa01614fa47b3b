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

BLOCK, ROWS, HELD_OUT = 64, 4, 24


def schedule_of(model: Any, layers: int, steps: int) -> Schedule:
    """Evenly from a fifteenth of the steps, for the last layers and the final norm."""
    sites = [site for site in ln_free.sites(model) if site.layer is None or site.layer >= first_layer(model, layers)]
    step = steps / (3 * len(sites))  # done after a third of the steps
    return Schedule.of([site.name for site in sites], max(1, steps / 15), (step, step, step))


def first_layer(model: Any, layers: int) -> int:
    """The first of the last layers."""
    return model.config.num_hidden_layers - layers


def prepared(name: str, text: str) -> tuple[Any, Any, torch.Tensor]:
    """Model, blocks to train on, blocks held out."""
    model, tokenizer = embedded.load(name)
    parts = data.pack(data.load_text(text), tokenizer, block_size=BLOCK).train_test_split(HELD_OUT, seed=0)
    return model, parts["train"], torch.tensor(list(parts["test"]["input_ids"]))


def tune(model: Any, blocks: Any, removing: bool, layers: int, steps: int, output: Path) -> None:
    """Fine-tune the last layers and the final norm in place."""
    model.requires_grad_(False)
    for module in (*model.base_model.layers[first_layer(model, layers) :], model.base_model.norm):
        module.requires_grad_(True)
    shared: dict[str, Any] = {
        "output_dir": str(output / "run"), "max_steps": steps, "per_device_train_batch_size": ROWS, "report_to": "none",
        "learning_rate": 1e-4, "warmup_steps": 3, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    if not removing:
        hf_xent.XentTrainer(model, hf_xent.XentConfig(**shared), train_dataset=blocks).train()
        return
    schedule = schedule_of(ln_free.wrap(model), layers, steps)
    config = hf_xent.LNRemovalConfig(**shared)
    hf_xent.LNRemovalTrainer(model, config, schedule=schedule, train_dataset=blocks).train()


def main(
    model: str = "smollm2", layers: int = 4, steps: int = 50, text: str = "pydoc",
    output: Path = Path("out/ln-free-smollm2"),
) -> dict[str, Any]:  # fmt: skip
    """The model as it was, and both arms; what is there already is not run again."""
    output.mkdir(parents=True, exist_ok=True)
    found = {}
    for arm in ("original", "vanilla", "norms removed"):
        file = output / f"{arm}.json"
        if not file.exists():
            loaded, blocks, held_out = prepared(model, text)
            if arm != "original":
                tune(loaded, blocks, arm == "norms removed", layers, steps, output)
            file.write_text(json.dumps(ln_free.analyze(loaded, held_out).as_dict()))
        found[arm] = json.loads(file.read_text())
        show(arm, {name: found[arm][name] for name in ("loss", "median", "entropy", "ece", "mean_nmae")})
    return found


if __name__ == "__main__":
    typer.run(main)
