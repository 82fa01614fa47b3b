"""How well weights of tokens find a planted sentence, and how faithful they are to a classifier; means over texts.

measured("occlusion", classifier, planted(0, 96, held=True), tokenizer, train)      {"AP": 0.61, "IoU": 0.4, ...}
"""

from __future__ import annotations

from typing import Any

import rationale_arms as arms
import torch
from planted_topics import TOPICS

from hf_xent import localization

SHARES, PLACES, PART = (0.1, 0.3), 20, 32


def batches(rows: Any, tokenizer: Any) -> Any:
    """Inputs, words, evidence (of planted texts) and labels, texts of like length together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["text"]))
    for part in (rows.select(order[i : i + PART]) for i in range(0, len(rows), PART)):
        inputs = dict(tokenizer(part["text"][:], padding=True, truncation=True, max_length=arms.LENGTH,
                                return_offsets_mapping=True, return_tensors="pt"))  # fmt: skip
        start, end = inputs.pop("offset_mapping").unbind(-1)
        words = localization.word_tokens(inputs["input_ids"], inputs["attention_mask"], tokenizer.all_special_ids)
        span = [torch.tensor(part[name][:])[:, None] if name in part.column_names else -1 for name in ("start", "end")]
        yield inputs, words, (start >= span[0]) & (end <= span[1]) & words, torch.tensor(part["labels"][:])


def seen(rows: Any, tokenizer: Any) -> dict[str, Any]:
    """What training texts tell: log odds of their words, and the share of evidence by place."""
    coded, found = arms.encoded(rows, tokenizer), torch.full((PLACES, 2), 1e-6)
    for _, words, evidence, _ in batches(rows, tokenizer):
        places = (words.cumsum(1) - 1) * PLACES // words.sum(1, keepdim=True)
        found[:, 0] += torch.bincount(places[evidence], minlength=PLACES)
        found[:, 1] += torch.bincount(places[words], minlength=PLACES)
    odds = localization.log_odds(coded["input_ids"][:], coded["labels"][:], len(tokenizer), len(TOPICS))
    return {"odds": odds, "places": found[:, 0] / found[:, 1]}


def measured(arm: str, model: Any, rows: Any, tokenizer: Any, train: Any) -> dict[str, float]:
    """Evidence scores, faithfulness, the area of masks, and the accuracy of the classifier."""
    classifier, found = (model.classifier if arm in arms.MASKS else model), []
    known = seen(train, tokenizer) if arm in ("log odds", "position") else {}
    for inputs, words, evidence, labels in batches(rows, tokenizer):
        weights = arms.weigh(arm, model, inputs, words, known)
        scores = localization.evidence_scores(weights, evidence, words)
        scores = {"AP": scores["average precision"], "IoU": scores["IoU"]}
        scores |= localization.faithfulness(classifier, inputs, weights, words, SHARES)
        if arm in arms.MASKS:
            scores["area"] = localization.mask_area(weights, words)
        found.append({**scores, "accuracy": (classifier(**inputs).logits.argmax(-1) == labels).float()})
    return {name: float(torch.cat([part[name] for part in found]).double().mean()) for name in found[0]}
