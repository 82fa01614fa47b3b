"""Scores of a data set's texts, written beside its rows; an interrupted run goes on where it stopped.

    run = Detection(Task.members, "texts.jsonl", label="member")
    texts = read(run)                               # what cannot be used is refused here, before anything long begins
    scores = run_scorer(run, load_scorer(run), texts, console)
    summary = summarize(run, texts, scores)

Until all texts are scored, a draft beside the output keeps the scores: a line of settings, then one for every CHUNK
batches.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from ..data import load_text
from ..data.files import expanded_path
from ..detection import CountedText, TextScorer, evaluate, get
from ..detection.counts import tracked
from ..models.loading import load
from ..system.files import replace_atomically
from .curves import draw_roc
from .detection import CLASSES, DEFAULT_CORPUS, Detection, Task
from .labels import binary_labels

CHUNK = 4  # batches between two writes of what is done
JSON = {"double_precision": 15, "date_format": "iso"}  # pandas rounds to ten places, and makes numbers of dates
WRITERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("to_csv", {}),
    ".parquet": ("to_parquet", {}),
    ".json": ("to_json", {**JSON, "lines": False}),
    ".jsonl": ("to_json", JSON),
}
"""Suffix -> the method of a dataset that writes such a file, and its options."""


class Texts(NamedTuple):
    """The rows of a data set and their labels [N], if it has any: 1, 0, or NaN for a missing one."""

    rows: Any
    labels: np.ndarray | None


def read(run: Detection) -> Texts:
    """The texts of a run and their labels.

    Raises:
        ValueError: If there is no such text or label, if a class has too few texts, or if the output would write over
            the source.
    """
    rows = load_text(run.source, run.split, run.column)
    _check_output(Path(run.output), run.source, rows.column_names, run.names)
    if run.label is None:
        return Texts(rows, None)
    least = 2 if run.task is Task.members else 1  # the blind baseline of membership needs two
    positive = "1" if run.positive is None else run.positive
    return Texts(rows, binary_labels(rows, run.column, run.label, positive, least))


def load_scorer(run: Detection) -> TextScorer:
    """The run's models, and its scores over them."""
    model, tokenizer = load(run.model, run.dtype)
    reference = load(run.reference, run.dtype)[0] if run.reference else None
    corpus = CountedText(DEFAULT_CORPUS if run.corpus is None else run.corpus, documents=run.documents)
    return TextScorer(
        model, tokenizer, run.names, reference=reference, frequencies=corpus, batch_size=run.batch_size,
        max_tokens=run.max_tokens, progress=False,
    )  # fmt: skip


def run_scorer(run: Detection, scorer: TextScorer, texts: Texts, console: Console) -> dict[str, np.ndarray]:
    """Score the texts of a run and write them to its output; the console shows how far it is."""
    column, output = texts.rows[run.column], Path(run.output)
    settings = json.dumps([scorer.fingerprint(), _digest(column), run.batch_size])
    draft = output.with_name(f".{output.name}.partial")
    scores = score_in_chunks(scorer, column, settings, draft, console)
    _write_rows(texts.rows, scores, output)
    draft.unlink()
    return scores


def score_in_chunks(
    scorer: TextScorer, texts: Any, settings: str, draft: Path, console: Console | None = None
) -> dict[str, np.ndarray]:
    """Scores of texts; those that an interrupted call with the same settings left in `draft` are not computed again.

    The first chunk is scored again and has to come out alike: settings do not tell of the device and of versions.

    Args:
        scorer: Gives the scores of a list of texts.
        texts: The texts, N of them.
        settings: What scores depend on, on one line; a draft that was made under other settings is begun anew.
        draft: The file that keeps the scores of finished chunks; it is left there.
        console: Where the progress bar is drawn.

    Returns:
        Score -> its values, [N].
    """
    draft.parent.mkdir(parents=True, exist_ok=True)
    lines = draft.read_text().splitlines() if draft.exists() else []
    chunks = [json.loads(line) for line in lines[1:] if line.endswith("}")] if lines[:1] == [settings] else []
    step = CHUNK * scorer.batch_size
    if chunks and not _alike(scorer(texts[:step]), chunks[0]):
        chunks = []
    draft.write_text("\n".join([settings, *map(json.dumps, chunks), ""]))
    todo = range(len(chunks) * step, len(texts), step)
    with draft.open("a") as file, tracked(todo, "scoring", console=console) as starts:
        for start in starts:
            chunks.append({name: values.tolist() for name, values in scorer(texts[start : start + step]).items()})
            file.write(json.dumps(chunks[-1]) + "\n")
            file.flush()
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in scorer.scores}


def summarize(run: Detection, texts: Texts, scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means of the scores and their directions; with labels also metrics, beside a plot of the ROC curves.

    Returns:
        `task`, `texts`, `scores` (the output), `means`, `higher_is` and `unscored`; with labels `metrics` as
        `hf_xent.detection.evaluate` gives them, `plot` and `unlabeled`.
    """
    classes = dict(zip(("positive", "negative"), CLASSES[run.task], strict=True))
    summary: dict[str, Any] = {
        "task": run.task.value,
        "texts": len(texts.rows),
        "scores": run.output,
        "means": {name: _mean(values) for name, values in scores.items()},
        "higher_is": {name: classes[get(name).higher_is] for name in scores},
        "unscored": int(np.isnan(next(iter(scores.values()))).sum()),
    }
    if texts.labels is not None:
        words = list(texts.rows[run.column]) if run.task is Task.members else None  # for the blind baseline
        resamples = 1000 if run.resamples is None else run.resamples
        summary["metrics"] = evaluate(scores, texts.labels, words, resamples=resamples)
        summary["plot"] = str(draw_roc(scores, texts.labels, summary["metrics"], Path(run.output).with_suffix(".png")))
        summary["unlabeled"] = int(np.isnan(texts.labels).sum())
    return summary


def _check_output(output: Path, source: str, columns: list[str], names: tuple[str, ...]) -> None:
    """Refuse what would fail, or lose something, only when everything is scored."""
    if output.suffix.lower() not in WRITERS:
        raise ValueError(f"output is {output}: give it one of the suffixes {', '.join(WRITERS)}")
    if output.is_dir():
        raise ValueError(f"output is {output}, which is a folder: name a file")
    place = expanded_path(source)
    if os.path.exists(place) and output.resolve().is_relative_to(place.resolve()):  # it would be read the next time
        raise ValueError(f"output is {output}, which is (in) the source: name another file")
    if taken := [name for name in names if name in columns]:
        raise ValueError(
            f"{source} has a column {taken[0]!r} already, and the score of that name is to be written beside it: rename"
            " or remove the column, or leave the score out"
        )


def _digest(texts: Iterable[Any]) -> str:
    """A hash of the texts, whatever file they are in."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps(text).encode())
    return digest.hexdigest()


def _alike(scores: dict[str, np.ndarray], before: dict[str, list[float]]) -> bool:
    """Whether scores are the same up to rounding, which is of the size of the largest: some are differences."""
    if scores.keys() != before.keys() or any(len(scores[name]) != len(before[name]) for name in scores):
        return False
    sizes = {name: np.nan_to_num(np.abs(values)).max(initial=0.0) for name, values in scores.items()}
    return all(np.allclose(scores[n], before[n], rtol=0, atol=1e-4 * sizes[n], equal_nan=True) for n in scores)


def _write_rows(rows: Any, scores: dict[str, np.ndarray], output: Path) -> None:
    """Write the rows with a column for each score, in one step."""
    for name, values in scores.items():
        rows = rows.add_column(name, values)
    method, options = WRITERS[output.suffix.lower()]
    if not options.get("lines", True):
        options = {**options, "batch_size": len(rows)}  # one list cannot be written in parts

    def write(draft: Path) -> None:
        with draft.open("wb") as file:  # opened here: `datasets` would take a name for a pattern
            getattr(rows, method)(file, **options)

    replace_atomically(output, write)


def _mean(values: np.ndarray) -> float | None:
    """The mean over the texts that have a score, if any has."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None
