# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-xent[detect]"]
# ///
"""Was a model trained on these texts? Scores of every text, and how well each score separates members from others.

    uv run detect_membership.py --model EleutherAI/pythia-160m --dataset swj0419/WikiMIA --split WikiMIA_length64

DATASET is a Hub id or a folder with JSON lines: a column with the text and one with the label, 1 for members. The score
`blind` reads the texts alone, never the model: a benchmark on which it is far from 0.5 does not show membership.
"""

import json
from pathlib import Path

import torch
import typer
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_xent import detection


def main(  # noqa: PLR0913  one argument per command-line option
    model: str = "EleutherAI/pythia-160m",
    dataset: str = "swj0419/WikiMIA",
    split: str = "WikiMIA_length64",
    text: str = "input",
    label: str = "label",
    scores: str = "loss,zlib,min_k,min_k_pp",
    limit: int = 0,
    resamples: int = 1000,
    output: Path = Path("out/membership.json"),
    push_to_hub: str = "",
) -> dict[str, dict[str, float]]:
    """Score the texts, write scores and metrics, and print the AUROC of each score."""
    rows = load_dataset(dataset, split=split)
    rows = rows.select(range(min(limit, len(rows)))) if limit else rows
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(model).to(device)
    names = tuple(scores.split(","))
    texts, labels = list(rows[text]), list(rows[label])
    scored = detection.TextScorer(loaded, AutoTokenizer.from_pretrained(model), names)(texts)
    metrics = detection.evaluate(scored, labels, texts, resamples=resamples)
    output.parent.mkdir(parents=True, exist_ok=True)
    found = {"model": model, "dataset": dataset, "split": split, "metrics": metrics}
    output.write_text(json.dumps(found, indent=2, default=float) + "\n")
    for name in metrics:
        print(f"{name:12} AUROC {metrics[name]['auroc']:.3f}")
    if push_to_hub:
        for name, values in scored.items():
            rows = rows.add_column(f"score_{name}", [float(x) for x in values])
        rows.push_to_hub(push_to_hub)
    return metrics


if __name__ == "__main__":
    typer.run(main)
