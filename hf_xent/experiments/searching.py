"""A search over options of a fine-tuning run: `searched(Search(space=["learning_rate=1e-5..1e-3:log"]))`.

Every trial is a run of `hf_xent.experiments.finetuning` whose options are those of the search, but for the names in its
space; `loss.gamma` is the option `gamma` of the loss. The score of a trial is the cross-entropy of the held-out text,
in nats per token, whatever the loss that it was trained with.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from ..system.files import replace_atomically
from .fields import option
from .finetuning import PATCHED, Run, make_trainer

SEARCHED = ("learning_rate", "batch_size", "accumulation", "steps", "lora", "tail", "loss")
"""The options of a run that a search may vary, beside those of the loss: the held-out text stays the same."""
IDLE = ("save", "save_steps", "resume")
"""The options of a run that a search does not have: no trial keeps its model, and every search resumes."""


@dataclass(frozen=True)
class Search(Run):
    """All settings of a search; each field but the idle ones is an option of `hf-xent search`."""

    space: list[str] = field(kw_only=True)  # what to search, as `hf_xent.cem.Space.parse` reads it
    trials: int = option("Training runs in all; more of them continue a search, if --candidates is given.", 20, min=2)
    method: str = option("'cem', the cross-entropy method, or 'random', random search.", "cem")
    candidates: int | None = option("Trials of a round [default: a fifth of the trials, from 4 to 20].", None, min=2)
    elites: float = option("Share of a round that the next one is fitted to; at least two trials are.", 0.2)
    seeds: int = option("Seeds that each trial is trained with; its loss is their mean.", 1, min=1)
    processes: int = option("Trials that are trained side by side.", 1, min=1)
    output: str = option("Folder of trials.json; a search that is there goes on.", "out/search")
    save: bool = False


def searched(search: Search) -> list[dict[str, Any]]:
    """Runs what is missing of a search.

    Args:
        search: The search. Its folder keeps every trial as it ends.

    Returns:
        The trials, best first: `number`, `parameters`, `score` (nats per token, None if it failed) and `error`.

    Raises:
        ValueError: An option that is out of range or cannot be searched, a folder with trials under other options, or
            if no trial of the first round succeeds.
    """
    from ..cem import search as run
    from ..models.quiet import quiet_loading

    check(search)
    _check_folder(search)
    names = ("method", "candidates", "elites", "seed", "seeds", "processes", "output")
    options = {name: getattr(search, name) for name in names}
    with quiet_loading():
        best = run(partial(trainer_of, search), search.space, held_out_loss, search.trials, **options)
    return sorted(best.run_summary, key=lambda trial: math.inf if trial["score"] is None else trial["score"])


def trainer_of(search: Search, trial: Mapping[str, Any]) -> Any:
    """The trainer of a trial. Model and text are the same each time: progress bars are shown for the first."""
    from ..models.quiet import quiet_loading

    with quiet_loading(), nullcontext() if getattr(trial, "number", 0) == 0 else _without_progress_bars():
        return make_trainer(applied(search, trial), PATCHED)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """A context in which transformers and datasets show none."""
    import datasets
    from transformers.utils import logging

    of_transformers, of_datasets = logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if of_transformers:
            logging.enable_progress_bar()
        if of_datasets:
            datasets.enable_progress_bars()


def held_out_loss(metrics: Mapping[str, float]) -> float:
    """The cross-entropy of an evaluation, nats per token."""
    return math.log(metrics["eval_perplexity"])


def applied(search: Search, parameters: Mapping[str, Any]) -> Search:
    """The search with the options of a trial."""
    plain = {name: value for name, value in parameters.items() if not name.startswith("loss.")}
    of_loss = {name.removeprefix("loss."): value for name, value in parameters.items() if name not in plain}
    loss = str(plain.get("loss", search.loss))
    if of_loss:
        written = ", ".join(f"{name}={value}" for name, value in of_loss.items())
        loss += f"{', ' if ':' in loss else ':'}{written}"
    return replace(search, **{**plain, "loss": loss})


def command(search: Search, parameters: Mapping[str, Any]) -> str:
    """The command line that trains with the options of a trial, and saves the model."""
    run, words = applied(search, parameters), ["hf-xent", "train"]
    words += [run.loss] if run.loss != Run.loss else []
    for one in fields(Run):
        value = getattr(run, one.name)
        if one.name in ("loss", "output", *IDLE) or value == one.default:
            continue
        words += [f"--{one.name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)


def check(search: Search) -> None:
    """Refuse a search whose trials would fail or not differ, before anything is loaded. Raises: ValueError."""
    from ..cem import CrossEntropyMethod, Space

    space = Space.parse(search.space)
    for name in space:
        if name not in SEARCHED and not name.startswith("loss."):
            raise ValueError(f"space has {name!r}: choose among {', '.join(SEARCHED)}, and loss.gamma or its like")
        if name in SEARCHED and getattr(search, name) != getattr(Run, name):
            raise ValueError(f"{name} is {getattr(search, name)!r} and searched, too: leave one of the two out")
    CrossEntropyMethod(space, search.candidates or 20, search.elites, method=search.method)
    for parameters in _extremes(space):
        _check_run(applied(search, parameters), parameters)


def _extremes(space: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Parameters with every end and every choice; those of the loss, which need one another, in all combinations."""
    ends = {name: getattr(one, "choices", None) or (one.low, one.high) for name, one in space.items()}
    of_loss = [name for name in space if name.partition(".")[0] == "loss"]
    base = {name: values[0] for name, values in ends.items()}
    for values in product(*(ends[name] for name in of_loss)):
        yield base | dict(zip(of_loss, values, strict=True))
    for name in space.keys() - {*of_loss}:
        yield from (base | {name: value} for value in ends[name])


def _check_run(run: Search, parameters: Mapping[str, Any]) -> None:
    """Refuse the options of a trial that the run does not take. Raises: ValueError."""
    from .. import losses

    for one in fields(Run):
        value = getattr(run, one.name)
        if one.name in parameters and isinstance(one.default, int) and type(value) is not int:
            raise ValueError(f"{one.name} is {value!r} in the space: give whole numbers, such as 1..4")
        if one.name in parameters and value < one.metadata.get("min", value):
            raise ValueError(f"{one.name} is {value!r} in the space: choose at least {one.metadata['min']}")
    objective = losses.get(run.loss)
    if objective.needs_teacher:
        raise ValueError(f"loss is {run.loss!r}: it needs a teacher model, which a search has no option for")
    objective.check_tail(run.tail)
    if not 0 < run.learning_rate < math.inf:
        raise ValueError(f"learning_rate is {run.learning_rate}: choose a positive number")


def _check_folder(search: Search) -> None:
    """Keep the options of the search beside its trials. Raises: ValueError if the folder has a search with others."""
    file = Path(search.output) / "search.json"
    given = asdict(search)
    kept = {name: value for name, value in given.items() if name not in ("trials", "processes", "output", *IDLE)}
    kept["candidates"] = search.candidates or min(max(search.trials // 5, 4), 20)
    if file.exists():
        before = json.loads(file.read_text())
        other = [name for name in kept if before.get(name) != kept[name]]
        if other:
            raise ValueError(
                f"{file} has a search with {other[0]}={before.get(other[0])!r}, not {kept[other[0]]!r}: choose another"
                " output folder"
            )
    replace_atomically(file, lambda draft: draft.write_text(json.dumps(kept, indent=1)))
