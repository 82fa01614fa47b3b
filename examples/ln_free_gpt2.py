"""Remove the LayerNorms of a small GPT-2 by fine-tuning; compare with plain fine-tuning and two controls, with spread.

    python examples/ln_free_gpt2.py [--text pydoc] [--pretraining 3000] [--steps 240] [--seeds 3] [--output out/ln-free]

The model is that of pretrain_gpt2.py, trained once; the arms are those of ln_free_arms.py. The arms of a seed see the
same batches. Losses are of held-out documents. The models of the first seed are saved, compared in a report and
plotted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import typer
from ln_free_arms import ARMS, tune
from pretrain_gpt2 import CONTEXT, ROWS, pretrain
from transformers import GPT2LMHeadModel

from hf_xent import ln_free
from hf_xent.experiments.study import Study

METRICS = ("loss", "median loss", "entropy", "ECE", "NMAE (%)", "sink rate", "worst 5 steps")


def untrained(model: Any, train: torch.Tensor, test: torch.Tensor) -> float:
    """The loss if all norms are removed at once, without training."""
    ln_free.wrap(model)
    ln_free.calibrate(model, [{"input_ids": train}])
    for site in ln_free.sites(model):
        ln_free.remove(model, site.name)
    return ln_free.analyze(model, test).loss


def main(
    text: str = "pydoc", pretraining: int = 3000, steps: int = 240, seeds: int = 3, sequences: int = 400,
    output: Path = Path("out/ln-free"),
) -> dict[str, dict[int, dict[str, float]]]:  # fmt: skip
    """Every arm under every seed; returns the metrics by arm and seed."""
    folder = output / "gpt2"
    _, tokenizer, blocks = pretrain(text, pretraining, folder)
    test = torch.tensor(list(blocks["test"]["input_ids"])[:sequences])
    settings = {"text": text, "pretraining": pretraining, "steps": steps, "tokens a step": ROWS * CONTEXT}
    study = Study("LN-free GPT-2", METRICS, "vanilla", output, seeds, settings | {"held-out tokens": test.numel()})
    for arm, seed in study.runs(ARMS):
        model = GPT2LMHeadModel.from_pretrained(folder)
        curve = tune(arm, seed, model, blocks["train"], steps, output)
        a = ln_free.analyze(model, test)
        values = (a.loss, a.median, a.entropy, a.ece, 100 * a.mean_nmae, a.sink_rate)
        if seed == 0:
            if arm == study.baseline:
                model.save_pretrained(output / arm)
                tokenizer.save_pretrained(output / arm)
            else:
                ln_free.save(ln_free.to_eps_trick(model), tokenizer, output / arm)
            (output / arm / "curve.json").write_text(json.dumps(curve))
        study.record(arm, seed, **dict(zip(METRICS, (*values, max(loss for _, loss in curve)), strict=True)))
    models = {"original": folder} | {arm: output / arm for arm in ARMS}
    report = ln_free.Report({name: ln_free.analyze(ln_free.load(str(path))[0], test) for name, path in models.items()})
    report.save(output)
    curves = {arm: json.loads((output / arm / "curve.json").read_text()) for arm in ARMS}
    model = ln_free.wrap(GPT2LMHeadModel.from_pretrained(folder))
    ln_free.draw_curves(curves, ln_free.Schedule.scaled(model, steps).events, output / "curves.png", study.name)
    naive = untrained(model, torch.tensor(list(blocks["train"]["input_ids"])[:64]), test)
    before = report.analyses["original"].loss
    note = f"Held-out loss before fine-tuning: {before:.4f}; with all norms replaced and no training: {naive:.4f}."
    return study.report(f"{note}\n\n{report.markdown()}")


if __name__ == "__main__":
    typer.run(main)
