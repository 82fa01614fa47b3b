"""What a classifier says of rows: its measures where labels are known, and a table of predictions."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..system.files import replace_atomically
from .class_rows import Part, name_of

SHORT = 200
"""The characters of a text up to which it is written beside its prediction."""


def measures(loss: Any, logits: Any, labels: Any) -> dict[str, float]:
    """Measures of predictions, over the rows or tokens with a label.

    Args:
        loss: The `hf_xent.classes.ClassLoss`, which reads classes or numbers out of logits.
        logits: [N, W] or [N, T, W].
        labels: [N] or [N, T].

    Returns:
        `accuracy` and `macro_f1` of classes; `mae`, `rmse` and `pearson` of numbers; `spearman` of a loss that ranks.
    """
    from ..metrics.labels import of_classes, of_numbers, of_order

    labels = np.asarray(labels)
    predicted = predictions(loss, logits)
    kept = np.isfinite(labels) if loss.labels == "values" else labels != -100
    measure = of_classes if loss.labels == "classes" else of_order if loss.together else of_numbers
    return measure(labels[kept], predicted[kept])


def predictions(loss: Any, logits: Any) -> np.ndarray:
    """Ids of classes, or numbers, [N] or [N, T]."""
    return loss.predict(_tensor(logits)).numpy()


def write_predictions(path: Path, loss: Any, logits: Any, part: Part, shown: dict[str, Any]) -> Path:
    """Writes a CSV file with a line for each row, or for each word of rows of tokens.

    Args:
        path: The file.
        loss: The loss, which reads classes or numbers and scores out of logits.
        logits: [N, W], or [N, T, W] for tokens.
        part: The rows that they are of.
        shown: What is written beside them: 'names' of classes, 'labels' and 'texts' or 'tokens' of all rows of the
            data, each of them if it is known.

    Returns:
        The file: columns row (the index in the data), word and token of tokens, text if it is short, label if it is
        known, predicted, and the score of each class.
    """
    names = shown.get("names")
    header = ["row", *(["word", "token"] if "tokens" in shown else ["text"] if "texts" in shown else [])]
    header += [*(["label"] if shown.get("labels") else []), "predicted", *(f"score {name}" for name in names or ())]

    def write(draft: Path) -> None:
        with draft.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(header)
            table.writerows(_lines(loss, logits, part, shown))

    return replace_atomically(path, write)


def _lines(loss: Any, logits: Any, part: Part, shown: dict[str, Any]) -> Iterator[list[Any]]:
    names, labels = shown.get("names"), shown.get("labels")
    predicted = predictions(loss, logits)
    scores = loss.scores(_tensor(logits)).numpy() if names else None
    for at, seen, label in _places(part, shown, labels):
        yield [
            int(part.indices[at[0]]),
            *seen,
            *(["" if label is None else name_of(label)] if labels else []),
            names[predicted[at]] if names else f"{predicted[at]:.6g}",
            *(f"{score:.6g}" for score in (scores[at] if scores is not None else ())),
        ]


def _places(part: Part, shown: dict[str, Any], labels: Any) -> Iterator[tuple[tuple[int, ...], list[Any], Any]]:
    """The place of each prediction in the logits, what was seen there, and its label."""
    for i, row in enumerate(part.indices.tolist()):
        label = labels[row] if labels else None
        if "tokens" in shown:
            for t, word in enumerate(part.rows[i]["words"]):
                if word >= 0:
                    yield (i, t), [word, shown["tokens"][row][word]], label[word] if label else None
        elif "texts" in shown:
            text = shown["texts"][row]
            yield (i,), [text if len(text) <= SHORT else ""], label
        else:
            yield (i,), [], label


def _tensor(logits: Any) -> Any:
    import torch

    return torch.as_tensor(np.asarray(logits, np.float32))
