"""Articles of topics of which some are held out, as features, and how well scores tell them from the others.

    articles = Articles(model, tokenizer, seed, folder)             features, labels, the names of topics
    articles.measured(score, topic)                                 AUROC, FPR95 and accuracy, with bootstrap intervals

A seed draws 700 articles, and the 4 of the 11 topics of topics.py that are held out. Those of the other 7 topics are
the positives; FPR95 is the share of articles of held-out topics that is accepted where 95 % of the positives are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from topics import topics

from hf_xent.metrics.ranking import auroc, bootstrap, fpr_at_tpr
from hf_xent.models.embeddings import encoded
from hf_xent.system.files import replace_atomically

HELD, DOCUMENTS, TOKENS = 4, 700, 64


class Articles:
    """The articles of a seed; those of `held` are others, for what needs labels."""

    def __init__(self, model: Any, tokenizer: Any, seed: int, folder: Path, held: bool = False):
        texts, labels, names = topics(seed, DOCUMENTS, held)
        order = np.random.default_rng(seed).permutation(len(names))
        self.names, self.unknown = [names[i] for i in order[:-HELD]], [names[i] for i in order[-HELD:]]
        self.labels = np.argsort(order)[labels]
        file = folder / f"articles-{seed}-{int(held)}.pt"
        if not file.exists():
            found = encoded(model, tokenizer, texts, max_length=TOKENS)
            replace_atomically(file, lambda draft: torch.save(found, draft))
        self.features = torch.load(file)

    def measured(self, score: Any, topic: Any) -> dict[str, float]:
        """Metrics of scores, large for known topics, and of the topics that are predicted for these."""
        known, found = self.labels < len(self.names), {}
        for name, metric in (("AUROC", auroc), ("FPR95", fpr_at_tpr)):
            interval = bootstrap(metric, known.astype(int), np.asarray(score))
            found |= {name: interval.value, f"{name} low": interval.low, f"{name} high": interval.high}
        return {**found, "accuracy": float((np.asarray(topic) == self.labels)[known].mean())}
