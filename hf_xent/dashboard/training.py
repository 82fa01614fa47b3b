"""Folders of trainings: `results.json` of the commands, and `trainer_state.json` of any trainer of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from . import logs
from .contents import RESULTS, Folder, Table, is_number, shown

MIB = 2**20


def read_outcomes(folder: Folder, stored: Mapping[str, Any]) -> None:
    """Adds the outcomes of `results.json`: a table before and after, one of time and memory, curves and settings."""
    outcomes = stored["outcomes"]
    of_classes = all("arm" not in outcome for outcome in outcomes)
    folder.kinds.append("classifier" if of_classes else "comparison" if len(outcomes) > 1 else "training")
    folder.set(stored.get("run", {}))
    found: logs.Series = {}
    for outcome in outcomes:
        found |= _series(outcome, outcome.get("arm", "training"))
    folder.tables += [table for table in (_before_and_after(outcomes), _costs(outcomes)) if table.rows]
    folder.charts += logs.charts(found)


def _series(outcome: Mapping[str, Any], arm: str) -> logs.Series:
    """The numbers of every step of an outcome."""
    losses = outcome.get("losses") or []
    found = logs.series(outcome.get("logs") or [{"loss": loss} for loss in losses], arm)
    before, after = _ends(outcome)
    for name, value in after.items():
        if is_number(value) and is_number(before.get(name)) and not name.endswith(logs.TIMES) and len(losses) > 1:
            measure = (name, arm, logs.EVALUATION)
            if (name, arm, "") in found:  # beside a curve of the training; alone, the table says it all
                found[measure] = [(0, before[name]), (_steps(outcome), value)]
    seconds, memory = outcome.get("seconds") or [], outcome.get("memory")
    found[("seconds", arm, "")] = [*enumerate(seconds, 1)]
    found[("memory", arm, "")] = [(i, m / MIB) for i, m in enumerate(memory if isinstance(memory, list) else [], 1)]
    return found


def _ends(outcome: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The measures before and after the training."""
    evaluations = outcome.get("evaluations") or []
    if len(evaluations) > 1:
        return evaluations[0], evaluations[-1]
    return outcome.get("before") or {}, outcome.get("after") or {}


def _before_and_after(outcomes: list[Mapping[str, Any]]) -> Table:
    """The measures of the held-out part, before and after, of every arm."""
    ends = [_ends(outcome) for outcome in outcomes]
    names = dict.fromkeys(name for _, after in ends for name in after)
    rows = []
    for name in names:
        if name in logs.UNSHOWN or name.endswith(logs.TIMES):
            continue
        cells = [shown(part.get(name)) for pair in ends for part in pair]
        rows.append([name.replace("_", " "), *cells])
    arms = [f"{outcome['arm']}, " if len(outcomes) > 1 else "" for outcome in outcomes]
    return Table("Held-out data", ["", *(f"{arm}{end}" for arm in arms for end in ("before", "after"))], rows)


def _costs(outcomes: list[Mapping[str, Any]]) -> Table:
    """Losses, time and memory of every arm, and what the second saves over the first."""
    rows, costs = [], []
    for outcome in outcomes:
        losses, steady, peak = outcome.get("losses") or [], _steady(outcome), _peak(outcome)
        if not losses:
            continue
        tokens = outcome.get("tokens_per_step", 0) / steady if steady else 0.0
        ends = f"{shown(losses[0])} → {shown(losses[-1])}"
        numbers = [shown(steady) if steady else "", f"{tokens:.0f}" if tokens else "", f"{peak:.0f}" if peak else ""]
        rows.append([outcome.get("arm", "training"), str(_steps(outcome)), ends, *numbers])
        costs.append((steady, peak))
    note = ""
    if len(rows) == 2 and all(map(all, costs)):
        (before, most), (after, least) = costs
        note = (
            f"{rows[1][0]} takes {after / before:.2f} times the seconds of {rows[0][0]}, and {least / most:.2f} times"
            " the memory (the peak of the process)."
        )
    head = ["", "steps", "training loss", "seconds a step", "tokens a second", "peak MiB"]
    filled = [i for i, _ in enumerate(head) if i == 0 or any(row[i] for row in rows)]
    return Table("Training", [head[i] for i in filled], [[row[i] for i in filled] for row in rows], RESULTS, note)


def _steps(outcome: Mapping[str, Any]) -> int:
    """The optimizer steps of an outcome; a trainer may log every tenth only."""
    logs, losses = outcome.get("logs") or [{}], outcome.get("losses") or []
    return max(int(logs[-1].get("step", 0)), len(losses), len(outcome.get("seconds") or []))


def _steady(outcome: Mapping[str, Any]) -> float:
    """The median of the seconds of a step, without the first, which also allocates; 0 if they are not known."""
    seconds = outcome.get("seconds") or []
    return median(seconds[1:] or seconds) if seconds else 0.0


def _peak(outcome: Mapping[str, Any]) -> float:
    """The peak memory in MiB, of all steps or of the whole training; 0 if it is not known."""
    memory = outcome.get("memory") or 0
    return (max(memory) if isinstance(memory, list) else memory) / MIB


def state_of(folder: Path) -> Path | None:
    """The `trainer_state.json` of a folder or of its newest checkpoint; None if there is neither."""
    checkpoints = [path for path in folder.glob("checkpoint-*/trainer_state.json") if _number(path) is not None]
    found = [
        *filter(Path.is_file, [folder / "trainer_state.json"]),
        *sorted(checkpoints, key=lambda path: _number(path) or 0, reverse=True),
    ]
    return found[0] if found else None


def _number(path: Path) -> int | None:
    number = path.parent.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else None


def read_state(folder: Folder, state: Mapping[str, Any]) -> None:
    """Adds a trainer's state: its curves, its evaluations, and what it says of the run.

    Of a folder whose `results.json` has curves already, only measures that are not there are added.
    """
    drawn = {chart.title for chart in folder.charts}
    found = logs.series(state["log_history"], "training")
    folder.charts += [chart for chart in logs.charts(found) if chart.title not in drawn]
    if drawn:
        return
    folder.kinds.append("training")
    if table := logs.evaluations(found):
        folder.tables.append(table)
    names = ("global_step", "max_steps", "epoch", "num_train_epochs", "train_batch_size", "best_metric")
    folder.set({name: state.get(name) for name in (*names, "best_model_checkpoint")})
    ends = [entry for entry in state["log_history"] if "train_runtime" in entry]
    if ends:
        rows = [[n.replace("_", " "), shown(float(v))] for n, v in ends[-1].items() if n.startswith("train_")]
        folder.tables.append(Table("Training", ["", "value"], rows))
