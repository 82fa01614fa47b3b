"""Choose the rows of a data set that fit a target, and write them with their scores; an interrupted run resumes.

    run = Selecting("pool.jsonl", k=1000, target="target.jsonl", by="compression:level=1")
    summary = run_selection(run, report, console)

Until the rows are written, a draft file beside the output keeps the scores of finished chunks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..data import load_text, select
from ..data.chunks import Report, digest
from ..data.selection import Selection, check_k
from ..detection import TextScorer
from ..models.fingerprints import fingerprint_tokenizer
from ..models.loading import load
from .scoring import check_output, score_in_chunks, write_rows
from .selection import LOSS, Selecting

COLUMNS = ("score", "row")
"""What is written beside a row's own columns: its score, and its place in the pool from 0."""
GAP = "reference_gap"


def run_selection(run: Selecting, report: Report | None = None, console: Console | None = None) -> dict[str, Any]:
    """Select the texts of a run and write them, the best first.

    Args:
        run: The run; it is checked.
        report: Called as `report(done, total)` in texts, unless models score.
        console: Where the progress of models is drawn.

    Returns:
        `texts`, `chosen`, `by`, `output`, `mean_score` (of the chosen), and `mean_bytes` of the chosen and of all.

    Raises:
        ValueError: An option has no effect or is missing, the data cannot be read, or the output would overwrite them.
    """
    run.check()
    rows, output = load_text(run.source, run.split, run.column), Path(run.output)
    check_output(output, run.source, rows.column_names, COLUMNS)
    texts = [text or "" for text in rows[run.column]]
    check_k(run.k, len(texts))  # before models score them
    draft = output.with_name(f".{output.name}.partial")
    if run.name == LOSS:
        losses = _losses(run, texts, draft, console)
        chosen = select(texts, None, run.k, LOSS, losses=losses)
    else:
        chosen = select(texts, _target(run), run.k, run.by, jobs=run.jobs, draft=draft, report=report)
    found = {"score": chosen.scores[chosen.indices], "row": chosen.indices}
    write_rows(rows.select(chosen.indices), found, output)
    draft.unlink(missing_ok=True)
    return _summary(run, texts, chosen)


def losses_of(
    texts: Sequence[str],
    tuned: Any,
    base: Any,
    tokenizer: Any,
    *,
    draft: Path | None = None,
    console: Console | None = None,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """The mean loss of every text under a model tuned on a target and under the model before, without logits.

    Args:
        texts: The texts, N of them.
        tuned: The model that was fine-tuned on the target.
        base: The model before.
        tokenizer: The tokenizer of both.
        draft: A file that keeps scored chunks, so that the same call resumes; it is not deleted.
        console: Where the progress is drawn.
        **options: Those of `hf_xent.detection.TextScorer`, such as `batch_size`.

    Returns:
        `losses` of `hf_xent.data.select(..., by="loss")`: nats a token, [N] and [N]; NaN for a text without a token.
    """
    scorer = TextScorer(tuned, tokenizer, ("loss", GAP), reference=base, progress=False, **options)
    if draft is None:
        found = scorer(texts)
    else:
        settings = json.dumps([scorer.fingerprint(), digest(texts), scorer.batch_size])
        found = score_in_chunks(scorer, texts, settings, draft, console)
    return found["loss"], found["loss"] + found[GAP]


def _losses(run: Selecting, texts: list[str], draft: Path, console: Console | None) -> tuple[np.ndarray, np.ndarray]:
    """The losses under the two models of a run. Raises: ValueError if their tokenizers differ."""
    (tuned, tokenizer), (base, other) = load(str(run.tuned)), load(str(run.base))
    if fingerprint_tokenizer(tokenizer) != fingerprint_tokenizer(other):
        raise ValueError(
            f"tuned is {run.tuned!r} and base is {run.base!r}, whose tokenizers differ: losses a token are comparable"
            " under one tokenizer only, choose models that share theirs"
        )
    options = {name: getattr(run, name) for name in ("batch_size", "max_tokens") if getattr(run, name) is not None}
    return losses_of(texts, tuned, base, tokenizer, draft=draft, console=console, **options)


def _target(run: Selecting) -> list[str] | None:
    """The target's texts, without empty ones; None if the run has no target."""
    if run.target is None:
        return None
    column = run.target_column or run.column
    return [text for text in load_text(run.target, run.target_split, column)[column] if text]


def _summary(run: Selecting, texts: list[str], chosen: Selection) -> dict[str, Any]:
    sizes = np.array([len(text.encode("utf-8", "surrogatepass")) for text in texts])
    scores = chosen.scores[chosen.indices]
    finite = scores[np.isfinite(scores)]
    return {
        "texts": len(texts),
        "chosen": len(chosen.indices),
        "by": run.by,
        "output": run.output,
        "mean_score": float(finite.mean()) if len(finite) else None,
        "mean_bytes": {"chosen": float(sizes[chosen.indices].mean()), "all": float(sizes.mean())},
    }
