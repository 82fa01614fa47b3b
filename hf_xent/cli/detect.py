"""`hf-xent detect`: score the texts of a data set; with labels, say what the scores are worth."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from rich.progress import track
from rich.table import Table
from typer import Argument, Option

from .app import Json, err, out, prepare, print_json

if TYPE_CHECKING:
    from ..detection import TextScorer
CHUNK = 4  # batches between two writes of what is done
WRITERS = {".csv": "to_csv", ".parquet": "to_parquet", ".json": "to_json", ".jsonl": "to_json"}


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
    positive: Annotated[str, Option(help="The label of members or generated texts; all others are negative.")] = "1",
    corpus: Annotated[str, Option(help="Where dc_pdd counts token frequencies, as SOURCE; a Hub id is streamed.")] = (
        "pydoc"
    ),
    documents: Annotated[int | None, Option(help="Documents of the corpus to count [default: all].", min=1)] = None,
    batch_size: Annotated[int, Option(help="Texts per forward pass.", min=1)] = 16,
    max_tokens: Annotated[int, Option(help="Tokens of a text that are scored.", min=1)] = 512,
    dtype: Annotated[str, Option(help="Dtype to load models in; 'auto' for their own.")] = "auto",
    resamples: Annotated[int, Option(help="Draws of the bootstrap behind an interval.", min=1)] = 1000,
    output: Annotated[Path, Option(help="Rows with their scores, as .csv, .parquet, .json or .jsonl.")] = Path(
        "out/detect/scores.csv"
    ),
    as_json: Json = False,
) -> None:
    """Score texts in one forward pass a batch: were they trained on, or are they generated?

    Interrupted, the same command goes on where it stopped.

    Labels tell how well each score separates. Members and non-members that differ in more than membership (topic, date)
    are separated by the blind baseline too, which has not seen the model: then no score is evidence of membership.
    """
    if output.suffix not in WRITERS:
        raise ValueError(f"output is {output}: give it one of the suffixes {', '.join(WRITERS)}")
    from ..data import load_text
    from ..detection import Corpus, TextScorer, evaluate
    from ..embedded import load

    rows = load_text(source, split, column)
    truth = None if label is None else _truth(rows, label, positive)
    names = DEFAULTS[task] + (WITH_REFERENCE[task] if reference else ()) if scores is None else _names(scores)
    prepare(model)
    loaded, tokenizer = load(model, dtype)
    second = load(reference, dtype)[0] if reference else None
    scorer = TextScorer(
        loaded, tokenizer, names, reference=second, frequencies=Corpus(corpus, documents=documents),
        batch_size=batch_size, max_tokens=max_tokens, progress=False,
    )  # fmt: skip
    settings = [rows._fingerprint, column, model, reference, names, corpus, documents, max_tokens, dtype, batch_size]
    found = _scored(scorer, rows[column], json.dumps(settings), output.with_name(f".{output.name}.partial"))
    _write(rows, found, output)
    summary = {"task": task.value, "texts": len(rows), "scores": str(output), **_summary(found, CLASSES[task])}
    if truth is not None:
        texts = list(rows[column]) if task is Task.members else None  # for the blind baseline of membership
        with err.status("bootstrapping"):
            summary["metrics"] = evaluate(found, truth, texts, resamples=resamples)
        summary["plot"] = str(_draw(found, truth, summary["metrics"], output.with_suffix(".png")))
    print_json(summary) if as_json else _show(summary)


def _names(scores: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in scores.split(";") if name.strip())


def _truth(rows: Any, label: str, positive: str) -> np.ndarray:
    """Labels as 0 and 1, before anything long is begun."""
    if label not in rows.column_names:
        raise ValueError(f"label is {label!r}: choose one of {', '.join(rows.column_names)}")
    found = [f"{v:g}" if isinstance(v, (bool, float)) else str(v) for v in rows[label]]
    truth = np.array([value == positive for value in found], dtype=int)
    if truth.min() == truth.max():
        kinds = ", ".join(sorted(set(found))[:5])
        raise ValueError(f"positive is {positive!r} but column {label!r} has {kinds}: both classes are needed")
    return truth


def _scored(scorer: TextScorer, texts: Any, settings: str, draft: Path) -> dict[str, np.ndarray]:
    """Scores of texts; what an interrupted run had under the same settings is read from `draft`, a line a chunk."""
    draft.parent.mkdir(parents=True, exist_ok=True)
    lines = draft.read_text().splitlines() if draft.exists() else []
    done = [json.loads(line) for line in lines[1:] if line.endswith("}")] if lines[:1] == [settings] else []
    draft.write_text("\n".join([settings, *map(json.dumps, done), ""]))
    step = CHUNK * scorer.batch_size
    with draft.open("a") as file:
        starts = range(len(done) * step, len(texts), step)
        for i in track(starts, "scoring", console=err):
            done.append({name: values.tolist() for name, values in scorer(texts[i : i + step]).items()})
            file.write(json.dumps(done[-1]) + "\n")
            file.flush()
    return {name: np.concatenate([part[name] for part in done]) for name in scorer.scores}


def _write(rows: Any, found: dict[str, np.ndarray], output: Path) -> None:
    for name, values in found.items():
        rows = rows.add_column(name, values)
    getattr(rows, WRITERS[output.suffix])(str(output))
    output.with_name(f".{output.name}.partial").unlink()


def _summary(found: dict[str, np.ndarray], classes: tuple[str, str]) -> dict[str, Any]:
    """Mean and direction of each score."""
    from ..detection import get

    sides = {"positive": classes[0], "negative": classes[1]}
    return {
        "means": {name: float(np.nanmean(values)) for name, values in found.items()},
        "higher_is": {name: sides[get(name).higher_is] for name in found},
        "unscored": int(np.isnan(next(iter(found.values()))).sum()),
    }


def _draw(found: dict[str, np.ndarray], truth: np.ndarray, metrics: dict[str, Any], path: Path) -> Path:
    """ROC curves, false positives on a logarithmic axis: what counts is on its left."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    from ..detection import get
    from ..detection.metrics import roc

    figure, axis = pyplot.subplots(figsize=(5.2, 4.4), layout="constrained")
    least = 1 / max(2, int((truth == 0).sum()))
    for name, values in found.items():
        kept = np.isfinite(values)
        false, true = roc(truth[kept], get(name).oriented(values)[kept])
        axis.step(np.maximum(false, least / 2), true, where="post", label=f"{name} ({metrics[name]['auroc']:.3f})")
    chance = np.geomspace(least / 2, 1)
    axis.plot(chance, chance, color="#8a8f98", linestyle=":", label="chance (0.500)")
    axis.set(xscale="log", xlabel="false positive rate", ylabel="true positive rate", title="ROC (AUROC)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


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
    out.print(f"scores in {summary['scores']}{plot}{skipped}", highlight=False, soft_wrap=True)
