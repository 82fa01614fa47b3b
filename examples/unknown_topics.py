"""Articles of topics that have no name: do scores of topic names alone tell them from the articles of the others?

    python examples/unknown_topics.py MINILM wordnet:FOLDER [--seeds 3] [--output out/unknown_topics]

A text analogue of detecting images of no class with CLIP: one sentence encoder (MiniLM) reads articles and the names of
their topics; unknown_articles.py has the task, unknown_words.py the words and the rows for tuning. Decided before: an
arm is better than the baseline, the largest softmax at temperature 1, if the 95 % interval of its difference in AUROC,
seed by seed, is beyond 0; so are mined words against random ones, and tuned prompts against those that they start
from. Prompts have LAPT's options and the last epoch counts. No arm but the last, a logistic regression on other
articles of all 11 topics and their labels, sees a label or an article: it is a ceiling. One thing was changed after
seed 0: the share of mixed rows that is any negative label was in equal parts on all, a loss of 16 in the first epoch.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import typer
from sklearn.linear_model import LogisticRegression
from unknown_articles import HELD, Articles
from unknown_words import CONTEXT, TEMPLATES, Words

from hf_xent.adapt import PromptOptions, PromptTuner, class_texts, ood_score
from hf_xent.experiments.study import Study
from hf_xent.models.embeddings import encoded

EPOCHS, FRESH = 10, 57
BASELINE, RANDOM, MINED, ORACLE = "max softmax, T 1", "random words", "negative labels", "labels of all topics"
TUNED = {"prompts, cross-modal": "cross-modal", "prompts, full": "full"}
ARMS = (BASELINE, "max softmax, T .01", RANDOM, MINED, *TUNED, ORACLE)
words_of = cache(Words)


def scored(arm: str, words: Words, seed: int, folder: Path) -> dict[str, float]:
    """The metrics of an arm."""
    model, tokenizer = words.model, words.tokenizer
    articles = Articles(model, tokenizer, seed, folder)
    x, names, more = articles.features, articles.names, {}
    w = class_texts(model, tokenizer, names, TEMPLATES["noun"])
    if arm == ORACLE:
        train = Articles(model, tokenizer, seed, folder, held=True)
        head = LogisticRegression(C=100.0, max_iter=2000).fit(train.features.numpy(), train.labels)
        shares = head.predict_proba(x.numpy())[:, :-HELD]
        return articles.measured(shares.sum(1), shares.argmax(1))
    if arm.startswith("max softmax"):
        return articles.measured(*ood_score(x, w, temperature=1.0 if arm == BASELINE else 0.01))
    negatives = words.mined(names, folder)
    t = words.drawn(names, folder) if arm == RANDOM else negatives.features
    if arm == MINED:
        listed = [*names, "", *articles.unknown, "", *negatives.names]
        (folder / f"words-{seed}.txt").write_text("\n".join(listed), encoding="utf-8")
        more = {"rank": words.rank(articles.unknown, names, folder)}
    if arm in TUNED:
        texts, labels = words.definitions(names, negatives, folder)
        options = PromptOptions(CONTEXT, TUNED[arm], epochs=EPOCHS, negatives_per_step=FRESH, seed=seed)
        tuner = PromptTuner(model, tokenizer, names, negatives.names, options)
        losses = tuner.fit(encoded(model, tokenizer, texts), torch.tensor(labels), folder / f"{arm}-{seed}")
        w, t, more = tuner.class_features(), tuner.negative_features(), {"first": losses[0], "last": losses[-1]}
    return articles.measured(*ood_score(x, w, t, seed=seed)) | more


def main(encoder: str, source: str, seeds: int = 3, output: Path = Path("out/unknown_topics")) -> dict[str, Any]:
    """Every arm under every seed; returns the metrics by arm and seed."""
    study = Study("Unknown topics", ("AUROC", "FPR95", "accuracy"), BASELINE, output, seeds, {"epochs": EPOCHS})
    for arm, seed in study.runs(ARMS):
        study.record(arm, seed, **scored(arm, words_of(encoder, source, seed), seed, output))
    others = [
        Study(study.name, study.metrics, arm, output, seeds, study.settings).markdown() for arm in (RANDOM, MINED)
    ]
    return study.report("\n\n".join(["Made by `examples/unknown_topics.py` of hf_xent.", str(__doc__), *others]))


if __name__ == "__main__":
    typer.run(main)
