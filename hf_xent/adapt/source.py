"""Rows with labels from where a model was trained: drawn as batches, and their class means, which may be in a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Generator, Tensor
from transformers import default_data_collator

from ..models.contexts import eval_mode
from ..models.embeddings import features, prototypes
from ..models.fingerprints import fingerprint_model
from ..system.files import replace_atomically
from ..system.progress import tracked

Collate = Callable[[list[Any]], Any]
LABELS = ("labels", "label")
LIMIT = 100_000
"""The rows that class means are made of, at most."""


def drawn(rows: Sequence[Any], size: int, collate: Collate | None, generator: Generator) -> dict[str, Any]:
    """A batch of `size` rows, or of all if there are fewer, none of them twice."""
    places = torch.randperm(len(rows), generator=generator)[:size].tolist()
    return dict((collate or default_data_collator)([rows[place] for place in places]))


def labels_of(batch: dict[str, Any]) -> Tensor:
    """Takes the labels out of a batch of source rows. Raises: ValueError without any."""
    found = [batch.pop(name) for name in LABELS if name in batch]
    if not found:
        raise ValueError(f"source has rows with {', '.join(batch)}: give their labels, too")
    return torch.as_tensor(found[0])


@torch.no_grad()
def source_prototypes(
    model: Any,
    rows: Sequence[Any],
    *,
    batch_size: int = 64,
    collate: Collate | None = None,
    file: str | Path | None = None,
) -> Tensor:
    """The mean of the features of each class over the first 100,000 rows; it goes to `RMT(prototypes=...)`.

    Args:
        model: The classifier, as it was trained.
        rows: Rows with the inputs of the model and `labels`.
        batch_size: Rows in a forward pass.
        collate: Makes a batch of rows; transformers' default collator if it is left out.
        file: Where the means are kept; means of another model or of another number of rows there are made again.

    Returns:
        [K, D], which are not of unit length.

    Raises:
        ValueError: A class has no row, or rows have no labels.
    """
    count = min(len(rows), LIMIT)
    made_of = {"model": fingerprint_model(model), "rows": count} if file is not None else {}
    if file is not None and Path(file).is_file():
        stored = torch.load(file, map_location="cpu", weights_only=True)
        if stored["made_of"] == made_of:
            return Tensor(stored["prototypes"]).to(next(model.parameters()).device)
    parts, labels = [], []
    starts = range(0, count, batch_size)
    with eval_mode(model), tracked(starts, "Prototypes", console=Console(stderr=True)) as bar:
        for start in bar:
            batch = dict(
                (collate or default_data_collator)([rows[i] for i in range(start, min(start + batch_size, count))])
            )
            labels.append(labels_of(batch))
            device = next(model.parameters()).device
            parts.append(features(model, {name: value.to(device) for name, value in batch.items()}, normalize=False))
    found = prototypes(torch.cat(parts), torch.cat(labels).to(parts[0].device), int(model.config.num_labels))
    if file is not None:
        stored = {"made_of": made_of, "prototypes": found.cpu()}
        replace_atomically(Path(file), lambda draft: torch.save(stored, draft))
    return found
