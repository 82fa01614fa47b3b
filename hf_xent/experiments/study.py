"""A comparison over seeds: arms against a baseline, with a table of differences and a card. It resumes run by run.

    study = Study("EMO", ("perplexity", "entropy"), baseline="cross-entropy", output=Path("out/emo"), seeds=3)
    for arm, seed in study.runs(ARMS):                    # the runs that results.json does not have yet
        rate = study.tuned(arm, (1e-4, 3e-4, 1e-3), lambda rate: validated(arm, rate))      # tried once for each arm
        study.record(arm, seed, perplexity=23.5, entropy=3.02)
    study.report("What was run, and what it shows.")

Every arm runs with the same seeds, so differences to the baseline are taken seed by seed, with Student's 95 % interval,

    mean_s(x_s - b_s) +- t_{0.975, n-1} sd_s(x_s - b_s) / sqrt(n)        over the n seeds that both have

which is wide for three seeds. It covers what the seed determines (data, order, noise), nothing else. What a study is to
decide, and how small a difference it can find, is in claims.py.

Several processes may share a study's folder, each with its own `first_seed`: what one records, the others keep.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from filelock import FileLock
from huggingface_hub import ModelCardData
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import t as student

from ..hub import render
from ..system.files import replace_atomically


@dataclass
class Study:
    """Results of arms by seed; the module's docstring has an example.

    Args:
        name: The title of the progress bar, the table and the card.
        metrics: The columns of the table; a run may record other metrics, too.
        baseline: The arm that the others are compared with.
        output: The folder of `results.json` and the card; existing results are read.
        seeds: How many seeds each arm runs with, from `first_seed`.
        settings: What all runs share. Results on disk that were obtained under other settings are refused, not mixed.
        first_seed: The first seed; a pilot takes other seeds than the study.

    Raises:
        ValueError: If `results.json` exists but cannot be read, or has other settings.
    """

    name: str
    metrics: tuple[str, ...]
    baseline: str
    output: Path
    seeds: int = 3
    settings: dict[str, Any] = field(default_factory=dict)
    first_seed: int = 0
    results: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict, init=False)
    """Arm -> seed -> metric -> number."""
    tried: dict[str, dict[float, float]] = field(default_factory=dict, init=False)
    """Arm -> value that `tuned` has tried -> its validation metric."""
    cost: dict[str, dict[int, float]] = field(default_factory=dict, init=False)
    """Arm -> seed -> seconds of CPU that the run took, over all cores and with its child processes."""

    def __post_init__(self) -> None:
        self.output = Path(self.output)
        self._spent = sum(os.times()[:4])
        self._read()

    def _read(self) -> None:
        """Takes the results on disk in place of those in memory, which are a part of them."""
        if not self.file.exists():
            return
        try:
            stored = json.loads(self.file.read_text())
            settings, results = stored["settings"], stored["results"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.file} holds no results of a study ({error!r}): move it away") from error
        if settings != json.loads(json.dumps(self.settings)):
            raise ValueError(
                f"{self.file} has results under the settings {settings}, but this study has {self.settings}: choose"
                " another output folder"
            )
        self.results = {arm: {int(seed): row for seed, row in rows.items()} for arm, rows in results.items()}
        tried = stored.get("tried", {})  # studies before it was kept have none
        self.tried = {arm: {float(value): score for value, score in scores.items()} for arm, scores in tried.items()}
        cost = stored.get("cost", {})
        self.cost = {arm: {int(seed): seconds for seed, seconds in rows.items()} for arm, rows in cost.items()}

    @property
    def file(self) -> Path:
        """The file of the results; it is written again after every run."""
        return self.output / "results.json"

    @contextmanager
    def _changed(self) -> Iterator[None]:
        """Around a change of the results, which is written; no other process writes in between."""
        self.output.mkdir(parents=True, exist_ok=True)
        with FileLock(self.output / ".results.lock"):
            self._read()
            yield
            stored = {"settings": self.settings, "results": self.results, "cost": self.cost}
            text = json.dumps(stored | ({"tried": self.tried} if self.tried else {}), indent=1)
            replace_atomically(self.file, lambda draft: draft.write_text(text))

    def runs(self, arms: Iterable[str]) -> Iterator[tuple[str, int]]:
        """The runs that have no results yet, behind a progress bar on standard error.

        Args:
            arms: The arms to run.

        Returns:
            An iterator of (arm, seed): all arms of one seed before those of the next.
        """
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        todo = [(arm, seed) for seed in seeds for arm in arms if seed not in self.results.get(arm, {})]
        for arm, seed in track(todo, description=self.name, console=Console(stderr=True)):
            self._read()
            if seed not in self.results.get(arm, {}):  # no other process has run it in the meantime
                self._spent = sum(os.times()[:4])
                yield arm, seed

    def record(self, arm: str, seed: int, **metrics: float) -> None:
        """Keep the numbers of one run, in `results` and on disk.

        Args:
            arm: The arm that was run.
            seed: The seed it was run with; an earlier result of this arm and seed is replaced.
            metrics: Metric -> number.
        """
        started, self._spent = self._spent, sum(os.times()[:4])
        with self._changed():
            self.results.setdefault(arm, {})[seed] = {name: float(value) for name, value in metrics.items()}
            self.cost.setdefault(arm, {})[seed] = round(self._spent - started, 2)

    def tuned(self, arm: str, values: Iterable[float], run: Callable[[float], float], *, higher: bool = True) -> float:
        """The value of an option, such as the learning rate, under which an arm does best on validation rows.

        What has been tried is kept on disk as results are, and is not tried again.

        Args:
            arm: The arm to tune; each has its own best value.
            values: The values to try, in this order.
            run: Trains with a value and returns the metric of validation rows, never of the rows that are reported.
            higher: Whether a higher metric is better; False for errors and losses.

        Returns:
            The best value, the earlier one of equals. A metric that is NaN, of a run that diverged, is the worst.

        Raises:
            ValueError: There are no values, or every run has diverged.
        """
        values = [float(value) for value in values]
        for value in values:
            if value not in self.tried.get(arm, {}):
                score = float(run(value))
                with self._changed():
                    self.tried.setdefault(arm, {})[value] = score
        scores = {value: self.tried[arm][value] for value in values if not isnan(self.tried[arm][value])}
        if not scores:
            raise ValueError(f"values is {values}, of which none has a metric for {arm!r}: try smaller ones")
        return (max if higher else min)(scores, key=scores.__getitem__)

    def values(self, arm: str, metric: str) -> dict[int, float]:
        """Seed -> the value of a metric for an arm; empty if the arm does not have the metric."""
        return {seed: row[metric] for seed, row in self.results.get(arm, {}).items() if metric in row}

    def gaps(self, arm: str, metric: str, against: str | None = None) -> list[float]:
        """The differences of an arm to another, the baseline by default, for the seeds that both have."""
        values, reference = self.values(arm, metric), self.values(against or self.baseline, metric)
        return [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]

    def difference(self, arm: str, metric: str, against: str | None = None) -> tuple[float, float] | None:
        """Mean difference to another arm over the seeds that both have, and half the width of its 95 % interval.

        Args:
            arm: The arm.
            metric: The metric.
            against: The other arm; None for the baseline.

        Returns:
            (mean, half width); the half width is NaN if there is one common seed. None for an arm against itself or
            without a common seed.
        """
        gaps = self.gaps(arm, metric, against)
        if arm == (against or self.baseline) or not gaps:
            return None
        n = len(gaps)
        half = float(student.ppf(0.975, n - 1)) * float(np.std(gaps, ddof=1)) / n**0.5 if n > 1 else float("nan")
        return mean(gaps), half

    def cell(self, arm: str, metric: str) -> str:
        """The text of a cell: the mean, the standard deviation over seeds, then the difference and its interval."""
        values = list(self.values(arm, metric).values())
        if not values:
            return ""
        text = f"{mean(values):.4g}" + (f" ({np.std(values, ddof=1):.2g})" if len(values) > 1 else "")
        difference = self.difference(arm, metric)
        if difference is None:
            return text
        width = "(one seed)" if len(self.gaps(arm, metric)) == 1 else f"± {difference[1]:.2g}"
        return f"{text}; {difference[0]:+.2g} {width}"

    def markdown(self) -> str:
        """The table in Markdown, one line for each arm, for cards and pages."""
        lines = ["| | " + " | ".join(self.metrics) + " |", "|---" * (len(self.metrics) + 1) + "|"]
        lines += [f"| {arm} | " + " | ".join(self.cell(arm, m) for m in self.metrics) + " |" for arm in self.results]
        legend = f"Mean (standard deviation) over seeds; difference to {self.baseline} ± half of its 95 % interval."
        return "\n".join([*lines, "", legend])

    def report(self, text: str, **front_matter: Any) -> dict[str, dict[int, dict[str, float]]]:
        """Print the table, and write it with a text into a card, README.md, beside the results.

        Args:
            text: What was run and what it shows, in Markdown.
            front_matter: Fields of the card's front matter (`license`, `base_model` ...), as the Hub names them.

        Returns:
            The results: arm -> seed -> metric -> number.
        """
        console, table = Console(), Table("", *self.metrics, title=f"{self.name}: difference to {self.baseline}")
        for arm in self.results:
            table.add_row(arm, *(self.cell(arm, metric) for metric in self.metrics))
        console.print(table)
        tags = ["hf_xent", *front_matter.pop("tags", [])]
        card_data = ModelCardData(library_name="transformers", tags=tags, **front_matter)
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "README.md").write_text(render("study", card_data, study=self, text=text), encoding="utf-8")
        return self.results
