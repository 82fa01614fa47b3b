"""Score the texts of a data set, and write the scores beside its rows; an interrupted run resumes where it stopped.

    run = Detection(Task.members, "texts.jsonl", label="member")
    texts = read(run)                               # unusable input is refused here, before any long computation
    scores = run_scorer(run, load_scorer(run), texts, console)
    summary = summarize(run, texts, scores)

Until all texts are scored, a draft file beside the output keeps the scores: a line of settings, then a line for every
CHUNK batches.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from ..data import load_text
from ..data.chunks import digest
from ..data.files import expanded_path
from ..detection import CountedText, TextScorer, evaluate, get
from ..models.loading import load
from ..system.drafts import Draft
from ..system.files import replace_atomically
from ..system.progress import tracked
from .curves import draw_roc
from .detection import CLASSES, DEFAULT_CORPUS, Detection, Task
from .detection_report import report_file, roc_points, write_report
from .labels import binary_labels

CHUNK = 4  # batches between two writes to the draft
JSON = {
    "double_precision": 15,
    "date_format": "iso",
}  # by default pandas rounds to ten places, and writes dates as numbers
WRITERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("to_csv", {}),
    ".parquet": ("to_parquet", {}),
    ".json": ("to_json", {**JSON, "lines": False}),
    ".jsonl": ("to_json", JSON),
}
"""Suffix -> the method of a dataset that writes such a file, and its options."""


class Texts(NamedTuple):
    """The rows of a data set and their labels [N], if it has any: 1, 0, or NaN for a missing label."""

    rows: Any
    labels: np.ndarray | None


def read(run: Detection) -> Texts:
    """Read the texts of a run and their labels.

    Raises:
        ValueError: If there is no such text or label, if a class has too few texts, or if the output would overwrite
            the source.
    """
    rows = load_text(run.source, run.split, run.column)
    check_output(Path(run.output), run.source, rows.column_names, run.names)
    if run.label is None:
        return Texts(rows, None)
    least = 2 if run.task is Task.members else 1  # the blind baseline for membership needs two
    positive = "1" if run.positive is None else run.positive
    return Texts(rows, binary_labels(rows, run.column, run.label, positive, least))


def load_scorer(run: Detection) -> TextScorer:
    """Load the models of a run, and build a scorer with its scores."""
    model, tokenizer = load(run.model, run.dtype)
    reference = load(run.reference, run.dtype)[0] if run.reference else None
    corpus = CountedText(DEFAULT_CORPUS if run.corpus is None else run.corpus, documents=run.documents)
    return TextScorer(
        model, tokenizer, run.names, reference=reference, frequencies=corpus, batch_size=run.batch_size,
        max_tokens=run.max_tokens, progress=False,
    )  # fmt: skip


def run_scorer(run: Detection, scorer: TextScorer, texts: Texts, console: Console) -> dict[str, np.ndarray]:
    """Score the texts of a run and write the rows with their scores to its output; the console shows the progress."""
    column, output = texts.rows[run.column], Path(run.output)
    settings = json.dumps([scorer.fingerprint(), digest(column), run.batch_size])
    draft = output.with_name(f".{output.name}.partial")
    scores = score_in_chunks(scorer, column, settings, draft, console)
    write_rows(texts.rows, scores, output)
    draft.unlink()
    return scores


def score_in_chunks(
    scorer: TextScorer, texts: Any, settings: str, draft: Path, console: Console | None = None
) -> dict[str, np.ndarray]:
    """Score texts; scores that an interrupted call with the same settings left in `draft` are not computed again.

    The first chunk is scored again and has to agree, since the settings do not include the device and versions.

    Args:
        scorer: Computes the scores of a list of texts.
        texts: The texts, N of them.
        settings: The settings that scores depend on, on one line; a draft with other settings is discarded.
        draft: The file that keeps the scores of finished chunks; it is not deleted.
        console: Where the progress bar is drawn.

    Returns:
        Score -> its values, [N].
    """
    kept, step = Draft(draft, settings), CHUNK * scorer.batch_size
    if kept.chunks and not _agree(scorer(texts[:step]), kept.chunks[0]):
        kept.chunks.clear()
    todo = range(len(kept.chunks) * step, len(texts), step)
    with kept.appending() as append, tracked(todo, "scoring", console=console) as starts:
        for start in starts:
            append({name: values.tolist() for name, values in scorer(texts[start : start + step]).items()})
    return {name: np.concatenate([chunk[name] for chunk in kept.chunks]) for name in scorer.scores}


def summarize(run: Detection, texts: Texts, scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """Summarize the scores by means and directions; with labels also by metrics, and draw the ROC curves.

    All of it is written to a report beside the scores, too, with the points of the ROC curves.

    Returns:
        `task`, `texts`, `scores` (the output), `means`, `higher_is`, `unscored` and `report`; with labels `metrics` as
        `hf_xent.detection.evaluate` returns them, `plot` and `unlabeled`.
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
    roc = None if texts.labels is None else roc_points(scores, texts.labels)
    return summary | {"report": str(write_report(run, summary, roc))}


def check_output(output: Path, source: str, columns: list[str], names: tuple[str, ...]) -> None:
    """Refuse an output that could not be written, or would overwrite data, after everything is scored."""
    if output.suffix.lower() not in WRITERS:
        raise ValueError(f"output is {output}: give it one of the suffixes {', '.join(WRITERS)}")
    if output.is_dir():
        raise ValueError(f"output is {output}, which is a folder: name a file")
    source_path = expanded_path(source)
    written = (output, report_file(output), output.with_suffix(".png"))
    inside = [file for file in written if file.resolve().is_relative_to(source_path.resolve())]
    if os.path.exists(source_path) and inside:  # the next run would read it as a source
        where = "which" if inside[0] == output else f"beside which {inside[0]} is written, which"
        raise ValueError(f"output is {output}, {where} is (in) the source: name another file")
    if taken := [name for name in names if name in columns]:
        raise ValueError(
            f"{source} already has a column {taken[0]!r}, but the score of that name would be written beside it: rename"
            " or remove the column, or leave the score out"
        )


def _agree(scores: dict[str, np.ndarray], before: dict[str, list[float]]) -> bool:
    """Whether scores agree up to rounding, relative to the largest value of each: some scores are differences."""
    if scores.keys() != before.keys() or any(len(scores[name]) != len(before[name]) for name in scores):
        return False
    sizes = {name: np.nan_to_num(np.abs(values)).max(initial=0.0) for name, values in scores.items()}
    return all(np.allclose(scores[n], before[n], rtol=0, atol=1e-4 * sizes[n], equal_nan=True) for n in scores)


def write_rows(rows: Any, scores: dict[str, np.ndarray], output: Path) -> None:
    """Write the rows with a column for each score; the file is replaced atomically."""
    for name, values in scores.items():
        rows = rows.add_column(name, values)
    method, options = WRITERS[output.suffix.lower()]
    if not options.get("lines", True):
        options = {**options, "batch_size": len(rows)}  # a single JSON list cannot be written in parts

    def write(draft: Path) -> None:
        with draft.open("wb") as file:  # opened here, since `datasets` would read a name as a pattern
            getattr(rows, method)(file, **options)

    replace_atomically(output, write)


def _mean(values: np.ndarray) -> float | None:
    """The mean over the texts that have a score, or None if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None
