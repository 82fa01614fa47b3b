"""The geometry of an instruction-tuned model's representations before and after short SFT and DPO with LoRA.

    python examples/geometry_tuning.py [--text pydoc] [--steps 12] [--seeds 3] [--output out/geometry_tuning]

Read are the first 24 tokens of 200 held-out passages of `--text`, a source for `hf_xent.data.load_text`. The task is
that of noisy_preferences.py; the control takes the same steps on shuffled labels, see shuffled_labels.py. Without a
step, or at a learning rate of 0, LoRA leaves the model as it is and every change is exactly 0. Resumable, run by run.

What counts was decided before the runs: a change is one if it is beyond 1.96 sd of the paired bootstrap over documents
with the same sign in all seeds, and it is due to the labels if its difference to the control, seed by seed, has a 95 %
interval without 0. 200 documents have at most 199 directions and the model has 576: these RankMe are those of this
sample, for comparison among its models alone, as the warning says. Some dozen steps are no stage of post-training.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from shuffled_labels import METHODS, tuned

from hf_xent import data
from hf_xent.experiments.geometry import change
from hf_xent.experiments.study import Study
from hf_xent.metrics.geometry import warn_if_few
from hf_xent.models import loading
from hf_xent.models.features import Documents

LABELS, CONTROL = "labels", "shuffled labels"
NAMES = {"rankme": "RankMe", "singular_rankme": "singular RankMe", "alpha": "alpha"}
METRICS = ("loss", *(f"{name} change" for name in NAMES.values()))
DOCUMENTS, LENGTH, RESAMPLES, OUT = 200, 24, 100, Path("out/geometry_tuning")


def passages(text: str) -> list[str]:
    """Passages of a source, evenly spaced; of pydoc those of topics that are not trained on."""
    rows = data.load_text(text, split="train[80%:]" if text == "pydoc" else None)
    found = [part for page in rows["text"] for part in page.split("\n\n") if len(part) > 100]
    return [found[i] for i in np.linspace(0, len(found) - 1, min(DOCUMENTS, len(found))).astype(int)]


def features(model: Any, documents: Documents) -> np.ndarray:
    """Of the last layer [M, D]."""
    return torch.cat([batch[-1] for batch in documents.features(model)]).numpy()


def by_seed(results: dict[str, dict[int, dict[str, float]]]) -> str:
    """Every run in a line of Markdown: what changed, with 95 % intervals over documents."""
    lines = []
    for arm, seed, row in ((arm, seed, row) for arm, rows in results.items() for seed, row in rows.items()):
        cells = [f"{n} {row[f'{n} change']:+.3g} ± {1.96 * row[f'{n} change (sd)']:.2g}" for n in NAMES.values()]
        lines.append(f"- {arm}, seed {seed}: {', '.join(cells)}")
    return "\n".join(lines)


def main(model: str = "smollm2", text: str = "pydoc", steps: int = 12, seeds: int = 3, output: Path = OUT) -> Any:
    """Both methods with both labels under every seed; returns the metrics by method, arm and seed."""
    base, tokenizer = loading.load(model, dtype=torch.float32)
    documents = Documents(passages(text), tokenizer, batch_size=8, max_length=LENGTH)
    warn_if_few(len(documents), base.config.hidden_size)
    before, found = features(base, documents), {}
    settings = {"model": model, "text": text.partition(":")[0], "steps": steps, "documents": len(documents)}
    for method in METHODS:
        study = Study(f"Geometry after {method}", METRICS, CONTROL, output / method, seeds, settings)
        for arm, seed in study.runs([LABELS, CONTROL]):
            options = {"output_dir": str(output / method / "run"), "max_steps": steps, "seed": seed}
            fresh = loading.load(model, dtype=torch.float32)[0]
            trained, loss = tuned(method, arm == CONTROL, fresh, tokenizer, **options)
            moved = change(before, features(trained, documents), resamples=RESAMPLES)
            numbers = {f"{NAMES[k]} change": moved[k][1] for k in NAMES}
            numbers |= {f"{NAMES[k]} change (sd)": moved[k][2] for k in NAMES}
            study.record(arm, seed, loss=loss, **numbers, **{f"{NAMES[k]} before": moved[k][0] for k in NAMES})
        text = f"Made by `examples/geometry_tuning.py` of hf_xent.\n\n{by_seed(study.results)}"
        found[method] = study.report(text, base_model=model)
    return found


if __name__ == "__main__":
    typer.run(main)
