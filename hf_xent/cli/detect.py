"""`hf-xent detect`: score the texts of a data set; with labels, say what the scores are worth."""

from __future__ import annotations

import hashlib
import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from rich.table import Table
from typer import Argument, Option

from ..detection.scores import SECOND_MODEL
from ..system.figures import panels, save
from .app import Json, check_dtype, err, out, prepare, print_json

if TYPE_CHECKING:
    from ..detection import TextScorer
CHUNK = 4  # batches between two writes of what is done
DEFAULT_CORPUS = "pydoc"
JSON = {"double_precision": 15, "date_format": "iso"}  # pandas rounds to ten places, and makes numbers of dates
WRITERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("to_csv", {}),
    ".parquet": ("to_parquet", {}),
    ".json": ("to_json", {**JSON, "lines": False}),
    ".jsonl": ("to_json", JSON),
}
"""Suffix -> the method of a dataset that writes such a file, and its options."""


class Task(StrEnum):
    """What texts are asked for."""

    members = "members"
    generated = "generated"


CLASSES = {Task.members: ("member", "non-member"), Task.generated: ("generated", "human")}
DEFAULTS = {
    Task.members: ("loss", "zlib", "lowercase", "min_k", "min_k_pp", "dc_pdd"),
    Task.generated: ("loss", "min_k_pp", "fast_detect"),
}
WITH_REFERENCE = {Task.members: ("reference",), Task.generated: ("fast_detect_pair", "binoculars")}


def detect(
    task: Annotated[Task, Argument(help="'members' of a model's training set, or texts 'generated' by a model.")],
    source: Annotated[str, Argument(help="'pydoc', a text/JSON/CSV/Parquet file or folder, or a Hub id.")],
    model: Annotated[str, Option(help="The model that scores: 'smollm2', a Hub id or path.")] = "smollm2",
    reference: Annotated[
        str | None, Option(help="A second model of the same vocabulary, for scores that compare with one.")
    ] = None,
    scores: Annotated[
        str | None, Option(help="Scores with options, ';' between them: 'min_k:k=0.1; dc_pdd' [default: by task].")
    ] = None,
    column: Annotated[str, Option(help="Column that holds the text.")] = "text",
    split: Annotated[str | None, Option(help="Split of the data set, such as 'train[:1000]'.")] = None,
    label: Annotated[str | None, Option(help="Column of labels; adds metrics, ROC plot, blind baseline.")] = None,
    positive: Annotated[
        str | None, Option(help="The label of members or generated texts; all others are negative [default: 1].")
    ] = None,
    corpus: Annotated[
        str | None,
        Option(
            help=f"Where dc_pdd counts token frequencies, as SOURCE; a Hub id is streamed [default: {DEFAULT_CORPUS}]."
        ),
    ] = None,
    documents: Annotated[int | None, Option(help="Documents of the corpus to count [default: all].", min=1)] = None,
    batch_size: Annotated[int, Option(help="Texts per forward pass.", min=1)] = 16,
    max_tokens: Annotated[int, Option(help="Tokens of a text that are scored.", min=1)] = 512,
    dtype: Annotated[str, Option(help="Dtype to load models in; 'auto' for their own.")] = "auto",
    resamples: Annotated[
        int | None, Option(help="Draws of the bootstrap behind an interval [default: 1000].", min=1)
    ] = None,
    output: Annotated[Path, Option(help="Rows with their scores, as .csv, .parquet, .json or .jsonl.")] = Path(
        "out/detect/scores.csv"
    ),
    as_json: Json = False,
) -> None:
    """Score texts in one forward pass a batch: were they trained on, or are they generated?

    Interrupted, the same command goes on where it stopped.

    Labels tell how well each score separates. Members and non-members that differ in more than membership (topic, date)
    are separated by the blind baseline too, which has not seen the model: then no score is evidence of membership.
    Texts without words or without a label are left out of the metrics.
    """
    check_dtype(dtype, "auto")
    names = DEFAULTS[task] + (WITH_REFERENCE[task] if reference else ()) if scores is None else _names(scores)
    needs = _needs(names)
    _check_used("without --label", label is not None, positive=positive, resamples=resamples)
    _check_used("but no score counts tokens", "frequencies" in needs, corpus=corpus, documents=documents)
    _check_used("but no score compares with it", not needs.isdisjoint(SECOND_MODEL), reference=reference)
    from ..data import load_text
    from ..detection import CountedText, TextScorer, evaluate
    from ..models.loading import load

    rows = load_text(source, split, column)
    _check_output(output, source, rows.column_names, names)
    truth = None if label is None else _truth(rows, column, label, "1" if positive is None else positive, task)
    prepare(model)
    loaded, tokenizer = load(model, dtype)
    second = load(reference, dtype)[0] if reference else None
    counted = CountedText(DEFAULT_CORPUS if corpus is None else corpus, documents=documents)
    scorer = TextScorer(
        loaded, tokenizer, names, reference=second, frequencies=counted, batch_size=batch_size, max_tokens=max_tokens,
        progress=False,
    )  # fmt: skip
    settings = json.dumps([scorer.fingerprint(), _digest(rows[column]), batch_size])
    found = _scored(scorer, rows[column], settings, output.with_name(f".{output.name}.partial"))
    _write(rows, found, output)
    summary = {"task": task.value, "texts": len(rows), "scores": str(output), **_summary(found, CLASSES[task])}
    if truth is not None:
        texts = list(rows[column]) if task is Task.members else None  # for the blind baseline of membership
        with err.status("bootstrapping"):
            summary["metrics"] = evaluate(found, truth, texts, resamples=1000 if resamples is None else resamples)
        summary["plot"] = str(_draw(found, truth, summary["metrics"], output.with_suffix(".png")))
        summary["unlabeled"] = int(np.isnan(truth).sum())
    print_json(summary) if as_json else _show(summary)


def _check_used(why: str, used: bool, **options: Any) -> None:
    """Raises: ValueError for an option that was given and has no effect."""
    if not used and (given := [name for name, value in options.items() if value is not None]):
        raise ValueError(f"{given[0]} is {options[given[0]]!r}, {why}: leave it out")


def _check_output(output: Path, source: str, columns: list[str], names: tuple[str, ...]) -> None:
    """What would fail, or lose something, only when everything is scored."""
    from ..data.files import place_of

    if output.suffix.lower() not in WRITERS:
        raise ValueError(f"output is {output}: give it one of the suffixes {', '.join(WRITERS)}")
    if output.is_dir():
        raise ValueError(f"output is {output}, which is a folder: name a file")
    place = place_of(source)
    if os.path.exists(place) and output.resolve().is_relative_to(place.resolve()):  # it would be read the next time
        raise ValueError(f"output is {output}, which is (in) the source: name another file")
    if taken := [name for name in names if name in columns]:
        raise ValueError(
            f"{source} has a column {taken[0]!r} already, and the score of that name is to be written beside it: rename"
            " or remove the column, or leave the score out"
        )


def _names(scores: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in scores.split(";") if name.strip()))
    if not names:
        raise ValueError(f"scores is {scores!r}: name one at least, such as 'loss; min_k:k=0.1'")
    return names


def _needs(names: tuple[str, ...]) -> set[str]:
    """What the scores take beside the statistics. Raises: ValueError for an unknown score or option."""
    from ..detection import get

    return {need for name in names for need in get(name).needs}


def _truth(rows: Any, column: str, label: str, positive: str, task: Task) -> np.ndarray:
    """Labels as 1 and 0, NaN for a missing one, before anything long is begun."""
    if label not in rows.column_names:
        raise ValueError(f"label is {label!r}: choose one of {', '.join(rows.column_names)}")
    found = [_word(value) for value in rows[label]]
    truth = np.array([np.nan if value is None else float(value == _word(positive)) for value in found])
    judged = truth[[bool(text and text.strip()) for text in rows[column]]]
    least = 2 if task is Task.members else 1  # what the blind baseline needs
    counts = [int((judged == kind).sum()) for kind in (1, 0)]
    if not max(counts) or not min(counts):
        kinds = ", ".join(sorted({value for value in found if value is not None})[:5]) or "no labels"
        raise ValueError(
            f"positive is {positive!r} but column {label!r} has {kinds}: both classes are needed, and --positive names"
            " the label of one"
        )
    if min(counts) < least:
        raise ValueError(f"label {label!r} tells {counts[0]} texts from {counts[1]}: {least} of each class are needed")
    return truth


def _word(value: Any) -> str | None:
    """A label as it is compared: True, 1, 1.0 and '1' are one, as are 'Yes' and 'yes'.

    A missing label (None, NaN, a cell that is empty or has nan) is None.
    """
    text = "" if value is None else str(value).strip().casefold()
    text = {"true": "1", "false": "0", "nan": ""}.get(text, text)
    try:
        number = float(text)
    except ValueError:
        return text or None
    return str(int(number)) if number.is_integer() else str(number)


def _digest(texts: Any) -> str:
    """What tells texts from others, whatever file they are in."""
    found = hashlib.sha256()
    for text in texts:
        found.update(json.dumps(text).encode())
    return found.hexdigest()


def _scored(scorer: TextScorer, texts: Any, settings: str, draft: Path) -> dict[str, np.ndarray]:
    """Scores of texts; what an interrupted run had under the same settings is read from `draft`, a line a chunk.

    The first chunk is scored again and has to come out alike: settings do not tell of the device and of versions.
    """
    from ..detection.counts import tracked

    draft.parent.mkdir(parents=True, exist_ok=True)
    lines = draft.read_text().splitlines() if draft.exists() else []
    done = [json.loads(line) for line in lines[1:] if line.endswith("}")] if lines[:1] == [settings] else []
    step = CHUNK * scorer.batch_size
    if done and not _alike(scorer(texts[:step]), done[0]):
        done = []
    draft.write_text("\n".join([settings, *map(json.dumps, done), ""]))
    todo = range(len(done) * step, len(texts), step)
    with draft.open("a") as file, tracked(todo, "scoring", console=err) as starts:
        for i in starts:
            done.append({name: values.tolist() for name, values in scorer(texts[i : i + step]).items()})
            file.write(json.dumps(done[-1]) + "\n")
            file.flush()
    return {name: np.concatenate([part[name] for part in done]) for name in scorer.scores}


def _alike(found: dict[str, np.ndarray], before: dict[str, list[float]]) -> bool:
    """Whether scores are the same up to rounding, which is of the size of the largest: some are differences."""
    if found.keys() != before.keys() or any(len(found[name]) != len(before[name]) for name in found):
        return False
    sizes = {name: np.nan_to_num(np.abs(values)).max(initial=0.0) for name, values in found.items()}
    return all(np.allclose(found[n], before[n], rtol=0, atol=1e-4 * sizes[n], equal_nan=True) for n in found)


def _write(rows: Any, found: dict[str, np.ndarray], output: Path) -> None:
    for name, values in found.items():
        rows = rows.add_column(name, values)
    whole = output.with_name(f".{output.name}.whole")
    method, options = WRITERS[output.suffix.lower()]
    if not options.get("lines", True):
        options = {**options, "batch_size": len(rows)}  # one list cannot be written in parts
    with whole.open("wb") as file:  # opened here: `datasets` would take a name for a pattern
        getattr(rows, method)(file, **options)
    whole.replace(output)
    output.with_name(f".{output.name}.partial").unlink()


def _summary(found: dict[str, np.ndarray], classes: tuple[str, str]) -> dict[str, Any]:
    """Mean and direction of each score."""
    from ..detection import get

    sides = {"positive": classes[0], "negative": classes[1]}
    return {
        "means": {name: _mean(values) for name, values in found.items()},
        "higher_is": {name: sides[get(name).higher_is] for name in found},
        "unscored": int(np.isnan(next(iter(found.values()))).sum()),
    }


def _mean(values: np.ndarray) -> float | None:
    """Of the texts that have a score, if any has."""
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if len(kept) else None


def _draw(found: dict[str, np.ndarray], truth: np.ndarray, metrics: dict[str, Any], path: Path) -> Path:
    """ROC curves, false positives on a logarithmic axis: what counts is on its left."""
    from ..detection import get
    from ..metrics.ranking import roc

    figure, [axis] = panels(1, 5.2, 4.4)
    least = 1 / max(2, int((truth == 0).sum()))
    for name, values in found.items():
        kept = np.isfinite(values) & np.isfinite(truth)
        false, true = roc(truth[kept], get(name).oriented(values)[kept])
        axis.step(np.maximum(false, least / 2), true, where="post", label=f"{name} ({metrics[name]['auroc']:.3f})")
    chance = np.geomspace(least / 2, 1)
    axis.plot(chance, chance, color="#8a8f98", linestyle=":", label="chance (0.500)")
    axis.set(xscale="log", xlabel="false positive rate", ylabel="true positive rate", title="ROC (AUROC)")
    axis.legend(frameon=False, fontsize=8)
    return save(figure, path)


def _show(summary: dict[str, Any]) -> None:
    metrics = summary.get("metrics", {})
    table = Table(title=f"{summary['texts']} texts: {summary['task']}")
    columns = ("AUROC", "95 %", "TPR@1%FPR", "TPR@5%FPR") if metrics else ()
    for name in ("score", "mean", "higher is", *columns):
        table.add_column(name, justify="left" if name in ("score", "higher is") else "right")
    for name in metrics or summary["means"]:
        mean = summary["means"].get(name)
        cells = [name, "" if mean is None else f"{mean:.4g}", summary["higher_is"].get(name, "")]
        if row := metrics.get(name):
            cells += [f"{row['auroc']:.3f}", f"{row['auroc_low']:.3f} to {row['auroc_high']:.3f}"]
            cells += [f"{row[key]:.3f}" for key in ("tpr@1%fpr", "tpr@5%fpr")]
        table.add_row(*cells)
    out.print(table)
    plot = f", ROC curves in {summary['plot']}" if "plot" in summary else ""
    skipped = f"; {summary['unscored']} texts without a token have no score" if summary["unscored"] else ""
    if summary.get("unlabeled"):
        skipped += f"; {summary['unlabeled']} texts without a label are left out of the metrics"
    out.print(f"scores in {summary['scores']}{plot}{skipped}", highlight=False, soft_wrap=True)
