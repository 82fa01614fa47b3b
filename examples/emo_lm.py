"""Fine-tune a language model under EMO, its baselines TaiLr and MixCE, and plain cross-entropy; compare, with spread.

    python examples/emo_lm.py [--model smollm2] [--steps 20] [--seeds 3] [--output out/emo]

Text: CPython's own documentation (no download). Perplexity, mean entropy and accuracy are of held-out blocks;
distinct-2 and rep-4 of unbiased samples that continue their first half. Sharper models repeat more and score otherwise
alike, so cross-entropy is sampled twice: as it is, and at the temperature that gives it EMO's entropy. The table goes
to standard output, the numbers to results.json, the table into a card beside it.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import hf_xent
from hf_xent import data, embedded, generation
from hf_xent.patching import lazily

ARMS = {
    "cross-entropy": "cross_entropy",
    "EMO": "emo",
    "TaiLr": "tailr:gamma=1e-5, w_min=0.2",
    "MixCE": "mixce:eta=0.3",
}
CONTROL = "cross-entropy at EMO's entropy"
METRICS = ("perplexity", "entropy", "accuracy", "distinct-2", "rep-4")
BLOCK, HELD_OUT, PROMPTS, NEW = 64, 32, 16, 32


def train(
    loss: str, model_name: str, steps: int, seed: int, output: Path
) -> tuple[Any, torch.Tensor, dict[str, float]]:
    """A trained model, its held-out blocks, and its metrics on them."""
    model, tokenizer = embedded.load(model_name)
    blocks = data.pack(data.load_text("pydoc", split="train[:20%]"), tokenizer, block_size=BLOCK)
    parts = blocks.train_test_split(test_size=HELD_OUT, seed=seed)
    config = hf_xent.EMOConfig(
        output_dir=str(output / loss.partition(":")[0]), loss=loss, max_steps=steps, per_device_train_batch_size=4,
        per_device_eval_batch_size=HELD_OUT, learning_rate=3e-5, seed=seed, logging_steps=5, save_strategy="no",
        report_to="none", lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = hf_xent.EMOTrainer(model, config, train_dataset=parts["train"], eval_dataset=parts["test"])
    trainer.train()
    found = trainer.evaluate()
    metrics = {name: found[f"eval_{name}"] for name in ("perplexity", "entropy")}
    metrics["accuracy"] = found["eval_mean_token_accuracy"]
    held_out = torch.tensor(parts["test"]["input_ids"])
    return trainer.model.eval(), held_out, metrics


def diversity(model: Any, blocks: torch.Tensor, seed: int, temperature: float = 1.0) -> dict[str, float]:
    """distinct-2 and rep-4 of continuations of the blocks' first halves."""
    prompts = blocks[:PROMPTS, : BLOCK // 2]
    made = generation.sample(model, prompts, tokens=NEW, seed=seed, temperature=temperature)
    return {"distinct-2": generation.distinct(made, 2), "rep-4": generation.repetition(made, 4)}


def cooled(model: Any, blocks: torch.Tensor, entropy: float) -> float:
    """The temperature at which a model has this entropy on the blocks."""
    with torch.no_grad(), lazily(model):
        logits = model(input_ids=blocks).logits[:, :-1]
    return generation.temperature_of(logits.hidden, logits.head, blocks[:, 1:], entropy)


def main(model: str = "smollm2", steps: int = 20, seeds: int = 3, output: Path = Path("out/emo")) -> dict[str, Any]:
    """Every arm under every seed; returns the metrics by arm, one entry a seed."""
    output.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in (*ARMS, CONTROL)}
    for seed in range(seeds):
        plain = None
        for arm, loss in ARMS.items():
            trained, blocks, metrics = train(loss, model, steps, seed, output)
            found[arm].append(metrics | diversity(trained, blocks, seed))
            if arm == "cross-entropy":
                plain = trained, blocks
            elif arm == "EMO" and plain is not None:
                temperature = cooled(*plain, metrics["entropy"])
                control = {"temperature": temperature, "entropy": metrics["entropy"]}
                found[CONTROL].append(control | diversity(*plain, seed, temperature))
    rows = {arm: [_summary(results, name) for name in METRICS] for arm, results in found.items()}
    title = f"{model}, {steps} steps of 4 x {BLOCK} tokens, {seeds} seeds: mean (standard deviation)"
    table = Table(title=title)
    for column in ("loss", *METRICS):
        table.add_column(column)
    for arm, row in rows.items():
        table.add_row(arm, *row)
    Console().print(table)
    (output / "results.json").write_text(json.dumps(found, indent=1))
    (output / "README.md").write_text(_card(title, rows))
    return found


def _summary(results: list[dict[str, float]], name: str) -> str:
    values = [result[name] for result in results if name in result]
    if not values:
        return ""
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4g} ({spread:.2g})"


def _card(title: str, rows: dict[str, list[str]]) -> str:
    lines = ["# Fine-tuning under EMO", "", f"{title}. Made by `examples/emo_lm.py` of hf_xent.", ""]
    lines += ["| loss | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
    lines += [f"| {arm} | " + " | ".join(row) + " |" for arm, row in rows.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
