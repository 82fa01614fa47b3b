"""Remove the RMSNorms of SmolLM2-135M that one constant can stand for, against plain fine-tuning: a partial run.

    python examples/ln_free_smollm2.py [--limit 1.5] [--steps 30] [--text pydoc] [--output out/ln-free-smollm2]

In most layers the first token's residual is up to 177 times as long as the others', and a mean of both suits neither.
Removed are the norms where its divisor is at most `limit` times that of the others; 1000 for all of them. All weights
train. One seed. Losses are of held-out blocks of the text.
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
from hf_xent.ln_free.norms import fake_norms

BLOCK, ROWS, HELD_OUT = 128, 4, 48


@torch.no_grad()
def even(model: Any, ids: torch.Tensor, limit: float) -> list[str]:
    """Sites of a wrapped model whose divisor at the first token is near that at the others, in the order of removal."""
    spreads: dict[Any, torch.Tensor] = {}

    def watch(norm: Any, args: Any) -> None:
        spreads[norm] = norm.spread(args[0])

    norms = fake_norms(model)
    handles = [norm.register_forward_pre_hook(watch) for norm in norms.values()]
    model.eval()(input_ids=ids)
    for handle in handles:
        handle.remove()
    near = {norm for norm, x in spreads.items() if x[:, 0].mean() <= limit * x[:, 1:].mean()}
    return [site.name for site in ln_free.sites(model) if norms[site.norm] in near]


def tune(model: Any, blocks: Any, names: list[str] | None, steps: int, output: Path) -> None:
    """Fine-tune in place; with names, their norms go evenly from a tenth to half of the steps."""
    shared: dict[str, Any] = {
        "output_dir": str(output / "run"), "max_steps": steps, "per_device_train_batch_size": ROWS, "report_to": "none",
        "learning_rate": 1e-4, "warmup_steps": steps // 10, "logging_steps": 5, "save_strategy": "no", "bf16": True,
        "use_cpu": not torch.cuda.is_available(), "disable_tqdm": True,
    }  # fmt: skip
    if names is None:
        hf_xent.XentTrainer(model, hf_xent.XentConfig(**shared), train_dataset=blocks).train()
        return
    gap = 0.4 * steps / max(1, len(names))
    schedule = ln_free.Schedule.of(names, max(1, steps / 10), (gap, gap, gap))
    config = hf_xent.LNRemovalConfig(**shared, sigma_weight=0.0)  # the final norm, which it is about, may stay
    hf_xent.LNRemovalTrainer(model, config, schedule=schedule, train_dataset=blocks).train()


def main(
    model: str = "smollm2", limit: float = 1.5, steps: int = 30, text: str = "pydoc",
    output: Path = Path("out/ln-free-smollm2"),
) -> dict[str, Any]:  # fmt: skip
    """The model as it was, and both arms; what is there already is not run again."""
    output.mkdir(parents=True, exist_ok=True)
    for arm in ("original", "vanilla", "norms removed"):
        if (output / f"{arm}.json").exists():
            continue
        loaded, tokenizer = embedded.load(model)
        parts = data.pack(data.load_text(text), tokenizer, block_size=BLOCK).train_test_split(HELD_OUT, seed=0)
        train, held_out = (torch.tensor(list(parts[name][:HELD_OUT]["input_ids"])) for name in ("train", "test"))
        names = even(ln_free.wrap(loaded), train[:8], limit) if arm == "norms removed" else None
        if arm != "original":
            tune(loaded, parts["train"], names, steps, output)
        row = ln_free.analyze(loaded, held_out).as_dict() | {"removed": names or []}
        (output / f"{arm}.json").write_text(json.dumps(row))
        show(arm, {name: row[name] for name in ("loss", "median", "entropy", "ece", "mean_nmae", "removed")})
    return {file.stem: json.loads(file.read_text()) for file in sorted(output.glob("*.json"))}


if __name__ == "__main__":
    typer.run(main)
