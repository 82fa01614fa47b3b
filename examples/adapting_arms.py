"""Ways to predict a stream, by name: a frozen model, entropy minimisation, and mean teachers of two consistencies."""

from __future__ import annotations

from typing import Any

import torch

from hf_xent.adapt import RMT, EntropyMinimization, source_prototypes

ARMS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "entropy minimisation": {},
    "source rows alone": {"target_weight": 0, "contrast_weight": 0},
    "CE teacher": {"consistency": "ce"},
    "SCE teacher": {"consistency": "sce"},
    "SCE teacher, no source": {"source_weight": 0},
}
EQUAL = "SCE teacher, rate of CE"


def predictor(arm: str, model: Any, rows: list[Any], batch: int, **options: Any) -> Any:
    """A function that gives the logits of a batch, and learns from it.

    Rows are those of the source; options are the learning rate and the seed.
    """
    if arm == "frozen":
        return torch.no_grad()(lambda batch: model(**batch).logits)
    if arm == "entropy minimisation":
        return EntropyMinimization(model, **options).predict
    chosen = ARMS.get(arm, {})
    if chosen.get("source_weight") == 0:
        return RMT(model, prototypes=source_prototypes(model, rows), **chosen, **options).predict
    return RMT(model, source=rows, source_batch_size=batch, **chosen, **options).predict
