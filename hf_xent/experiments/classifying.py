"""One training of a classifier, and its execution in this process: `classified(Classifying(...))`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bench.memory import PeakMemory
from ..models.quiet import quiet_loading
from .class_settings import Classifying, Report
from .class_setup import prepared
from .finetuning import checkpoint_of, watching


@dataclass
class Classified:
    """What a run did and measured."""

    task: str
    loss: str
    """The loss, with the options that are not its defaults."""
    names: list[str] | None
    """The classes in the order of their ids."""
    rows: dict[str, int]
    """How many rows there were to train on, held out, and without a label."""
    before: dict[str, float]
    """Loss and measures of the held-out rows."""
    after: dict[str, float]
    losses: list[float] = field(default_factory=list)
    """The training loss of each step."""
    seconds: list[float] = field(default_factory=list)
    memory: int = 0
    """Peak memory of the training, bytes."""
    predictions: str = ""
    """The file of predictions."""
    predicted: dict[str, float] = field(default_factory=dict)
    """How many rows were predicted, and their measures if they had labels."""


SILENT = Report()


def classified(run: Classifying, report: Report = SILENT) -> Classified:
    """Trains, evaluates and predicts in this process.

    Args:
        run: The run; with `run.save` the model and its card are written to `run.output`.
        report: Who is told of the progress.

    Returns:
        Losses, times and measures; the predictions are in a CSV file.

    Raises:
        ValueError: An option, the data or the model cannot be used, or there is no checkpoint to resume from.
    """
    run.check_sources()
    with quiet_loading():
        task = prepared(run, report)
        trainer, steps = task.trainer, task.steps
        report.total(steps)
        watch = watching(report.step, memory=False)
        trainer.add_callback(watch)
        checkpoint = checkpoint_of(run, steps)
        report.phase("evaluating")
        before = after = _evaluated(trainer)
        if steps:
            report.phase("training")
            with PeakMemory(trainer.args.device) as memory:
                trainer.train(resume_from_checkpoint=checkpoint)
            report.phase("evaluating")
            after = _evaluated(trainer)
            if run.save:
                report.phase("saving")
                task.save(run.output)
        report.phase("predicting")
        path, predicted = task.predict(Path(run.predictions or Path(run.output, "predictions.csv")))
    return Classified(
        task=task.data.columns.task,
        loss=str(task.run.loss),
        names=task.classifier.names,
        rows=task.counts,
        before=before,
        after=after,
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        seconds=watch.seconds,
        memory=memory.peak if steps else 0,
        predictions=str(path),
        predicted=predicted,
    )


def _evaluated(trainer: Any) -> dict[str, float]:
    """Loss and measures, without their prefix and the times."""
    found = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    unwanted = ("runtime", "per_second", "model_preparation_time", "epoch")
    return {name: value for name, value in found.items() if not name.endswith(unwanted)}
