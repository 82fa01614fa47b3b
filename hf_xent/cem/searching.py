"""Hyperparameters of a trainer by the cross-entropy method: as `Trainer.hyperparameter_search`, and it resumes.

    best = search(trainer, hp_space, budget=20)          a trainer that has model_init
    best = search(make_trainer, hp_space, budget=20)     a function that makes one: of nothing, or of the trial

    score of a trial = mean over its seeds of compute_objective(metrics of the evaluation after training)

Every finished trial is in `trials.json` of the output folder. A search that was interrupted and is started again trains
the trials that are missing, and draws the candidates that it would have drawn.

The trials of a round do not depend on one another, so `processes` trains as many of them side by side. A trial that
fails, or whose score is not finite, is worse than every other; its error is in `trials.json`, and is kept there when
the search resumes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..options.ranges import check_count
from .dimensions import Categorical, Integer, Real
from .journal import Journal
from .method import CrossEntropyMethod
from .space import Space
from .training import FACTORY, Outcome, check_names, check_trainer, is_factory, made, takes_trial
from .trial import Trial
from .workers import Here, Job, Processes, runner

if TYPE_CHECKING:
    from transformers.trainer_utils import BestRun

DEFAULT_SPACE = {
    "learning_rate": Real(1e-6, 1e-4, log=True),
    "num_train_epochs": Integer(1, 5),
    "per_device_train_batch_size": Categorical([4, 8, 16, 32, 64]),
}
"""What transformers searches by default, without the seed: a seed is noise, not an option."""
REPORTING = ("output_dir", "log", "run_name", "project", "report_to", "disable_tqdm", "hub", "push", "trackio", "save")
"""Arguments that begin so do not change what a trial's score means."""


@dataclass(frozen=True)
class SearchOptions:
    """Options of `search`.

    Args:
        candidates: Trials of a round; a fifth of the budget by default, from 4 to 20.
        elites: The share of a round that is fitted; at least two trials are.
        smoothing: The weight of the new fit.
        seed: Of the candidates, not of the training.
        method: "cem", or "random" for the control.
        patience: Stop when the best has not changed for so many rounds.
        seeds: How many seeds each trial is trained with; its score is their mean.
        processes: How many trials are trained side by side; above 1, `search` needs a function that makes the trainer.
            Its data loaders then have no processes of their own (`dataloader_num_workers=0`).
        output: The folder of `trials.json` and, in `run-k`, of checkpoints; that of the trainer's arguments by default.
    """

    candidates: int | None = None
    elites: float = 0.2
    smoothing: float = 0.7
    seed: int = 0
    method: str = "cem"
    patience: int | None = None
    seeds: int = 1
    processes: int = 1
    output: str | Path | None = None


def eval_loss(metrics: Mapping[str, float]) -> float:
    """The default objective: `eval_loss`.

    Raises:
        ValueError: If the evaluation has none, as with several evaluation sets.
    """
    if "eval_loss" not in metrics:
        raise ValueError(f"the evaluation has no eval_loss but {', '.join(metrics)}: pass compute_objective")
    return metrics["eval_loss"]


def search(
    trainer: Any,
    hp_space: Any = None,
    compute_objective: Callable[[dict[str, float]], float] | None = None,
    budget: int = 20,
    direction: str = "minimize",
    **options: Any,
) -> BestRun:
    """The best training arguments of a trainer, by the cross-entropy method.

    Args:
        trainer: A trainer that has `model_init`, or a function that makes a trainer. A function of no arguments makes
            the same one every time, whose arguments are then set; one of a `Trial`, a mapping of name -> value, makes
            it with the trial's parameters, which is how options are searched that are read when it is made.
        hp_space: A function of a trial, as `Trainer.hyperparameter_search` takes it; or what `Space.of` makes a space
            from. By default learning rate, epochs and batch size.
        compute_objective: From the metrics of an evaluation to a score; `eval_loss` by default.
        budget: How many trials.
        direction: "minimize" or "maximize".
        **options: Of `SearchOptions`.

    Returns:
        transformers' `BestRun`: `run_id`, `objective`, `hyperparameters`, and in `run_summary` all trials. The
        trainer's arguments are as before; its model is that of the last trial.

    Raises:
        ValueError: For an option out of its range, a name that is no training argument or has no effect, a trainer
            that cannot be searched, trials on disk of another search, or if every trial of a round fails at first.
    """
    from transformers.trainer_utils import BestRun

    run = _Search(trainer, hp_space, compute_objective, (budget, direction), SearchOptions(**options))
    best = run.finished()
    trials = [run.journal.trials[k] for k in sorted(run.journal.trials)]
    return BestRun(str(best["number"]), best["score"], best["parameters"], trials)


class _Search:
    def __init__(
        self, source: Any, hp_space: Any, objective: Any, goal: tuple[int, str], options: SearchOptions
    ) -> None:
        self.source, self.options = source, options
        (self.budget, direction), self.objective = goal, objective or eval_loss
        for name in ("seeds", "processes"):
            check_count(name, getattr(options, name), 1)
        check_count("budget", self.budget, 2)
        self.hp_space = hp_space if callable(hp_space) else None
        space = Space.of(DEFAULT_SPACE if hp_space is None else hp_space)
        candidates = min(max(self.budget // 5, 4), 20) if options.candidates is None else options.candidates
        names = ("elites", "smoothing", "seed", "method", "patience")
        chosen = {name: getattr(options, name) for name in names}
        self.method = CrossEntropyMethod(space, candidates, direction=direction, **chosen)
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        self.read: set[str] = set()
        with runner(source, options.processes):
            pass  # whether it can be sent to processes is known before anything is made
        self._prepare()

    def _prepare(self) -> None:
        """Checks the trainer, and reads what is on disk."""
        method, output, arguments = self.method, self.options.output, {}
        params = CrossEntropyMethod(method.space, method.candidates, seed=method.seed).ask(1)[0]
        self.names = list(self._applied(Trial(0, params)))
        self.known: set[str] = set()
        """The training arguments that a trial may set: none where the factory reads the trial."""
        if not (is_factory(self.source) and takes_trial(self.source)):
            trainer = made(self.source, Trial(0, params))
            check_trainer(self.source, trainer)
            check_names(trainer, self.names)
            self.known = {f.name for f in fields(trainer.args)}
            output, arguments = output or trainer.args.output_dir, self._arguments(trainer.args)
        if output is None:
            raise ValueError("output is None, but make_trainer takes the trial: give the folder of the search")
        if self.options.seeds > 1 and "seed" in self.names:
            raise ValueError(f"seeds is {self.options.seeds}, but seed is searched: leave it out of the space")
        self.output = Path(output)
        names = ("candidates", "elites", "smoothing", "seed", "method", "direction", "patience")
        settings = {
            "space": {name: repr(d) for name, d in method.space.items()},
            "arguments": arguments,
            "objective": getattr(self.objective, "__qualname__", type(self.objective).__qualname__),
            "seeds": self.options.seeds,
            **{name: getattr(method, name) for name in names},
        }
        self.journal = Journal(self.output / "trials.json", settings)

    def _arguments(self, args: Any) -> dict[str, Any]:
        """The training arguments that are not at their defaults, as JSON has them."""
        kept = {}
        for f in fields(args):
            value = getattr(args, f.name)
            if f.init and f.name not in self.names and not f.name.startswith(REPORTING) and value != f.default:
                kept[f.name] = value
        return json.loads(json.dumps(kept, default=lambda value: getattr(value, "value", type(value).__name__)))

    def _applied(self, trial: Trial) -> dict[str, Any]:
        """What a trial sets: the dictionary that a function of a trial returns, else all parameters."""
        if self.hp_space is None:
            return dict(trial)
        returned = self.hp_space(trial)
        if not isinstance(returned, Mapping):
            raise ValueError(f"hp_space returns {returned!r}: return a dictionary of training arguments")
        return dict(returned)

    def finished(self) -> dict[str, Any]:
        """Runs what is missing, and returns the best trial."""
        done = 0
        with runner(self.source, self.options.processes) as run:
            while done < self.budget and not self.method.stopped:
                batch = self.method.ask(min(self.method.candidates, self.budget - done))
                self._round(run, [Trial(done + place, params) for place, params in enumerate(batch)])
                self.method.tell(batch, [self.journal.score(done + place) for place in range(len(batch))])
                done += len(batch)
                if self.method.score is None:
                    error = " ".join(self.journal.trials[0]["error"].split())
                    raise ValueError(f"all {done} trials failed, the first with {error}: see {self.journal.file}")
        ran = (self.journal.trials[number] for number in range(done))
        return next(trial for trial in ran if trial["score"] == self.method.score)

    def _round(self, run: Here | Processes, trials: list[Trial]) -> None:
        jobs, seeds = [], self.options.seeds
        for trial in trials:
            if not self.journal.has(trial.number, trial):
                settings = {name: value for name, value in self._applied(trial).items() if name in self.known}
                jobs.append(Job(trial.number, trial.params, settings, self.output / f"run-{trial.number}", seeds))
        succeeded = False
        for job, outcome in run.run(jobs):
            scores, error = self._scores(outcome)
            self.journal.record(job.number, job.params, scores, error)
            self.read |= outcome.read
            succeeded = succeeded or error is None
            self._report(job.number)
        unread = [name for job in jobs[:1] for name in job.settings if name not in self.read]
        if succeeded and unread:
            raise ValueError(f"{unread[0]} had no effect on a trial: it is read when the trainer is made, so {FACTORY}")

    def _scores(self, outcome: Outcome) -> tuple[list[float] | None, str | None]:
        if outcome.error is not None:
            return None, outcome.error
        scores = [float(self.objective(metrics)) for metrics in outcome.metrics]
        return (scores, None) if all(map(math.isfinite, scores)) else (None, f"the score is {scores}")

    def _report(self, number: int) -> None:
        trial, values = self.journal.trials[number], self.journal.trials.values()
        found = [other["score"] for other in values if other["score"] is not None]
        best = (min if self.method.direction == "minimize" else max)(found, default=None)
        shown = ", ".join(
            f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in trial["parameters"].items()
        )
        score = f"{trial['score']:.4g} (best {best:.4g})" if trial["error"] is None else f"failed: {trial['error']}"
        text = f"trial {number + 1} of {self.budget}: {score}  {shown}"
        self.console.print(text, markup=False)
