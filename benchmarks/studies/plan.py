"""A study of a method: what is run, and what is decided beforehand; its pages get both from here.

Results are in benchmarks/results/studies/NAME/results.json, those of a pilot in NAME/pilot; they are kept run by run.
docs/results/PAGE.md is written by hand but for two blocks of each study:

    <!-- decided: NAME -->      the claims: arms, margins, and what the seeds can find with the pilot's spread
    <!-- results: NAME -->      the table, the verdicts, the numbers by seed, the cost

which end with <!-- end -->.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from hf_xent.experiments.claims import UNDECIDED, Claim, detectable
from hf_xent.experiments.study import Study

RESULTS, PAGES, WORK = Path("benchmarks/results/studies"), Path("docs/results"), Path("out/studies")
PILOT_SEED = 100


@dataclass(frozen=True)
class Job:
    """Where and how large to run.

    Args:
        work: A folder for models, texts and checkpoints, which later runs use again.
        text: The folder of corpora.py.
        base: The folder of base.py.
        device: 'cpu' or 'cuda'.
        budget: A factor on the steps, tokens and texts of a run.
        tiny: The smallest run that goes through all the code, for tests.
    """

    work: Path
    text: Path = WORK / "text"
    base: Path = WORK / "base"
    device: str = "cpu"
    budget: float = 1.0
    tiny: bool = False

    @property
    def variant(self) -> str:
        """The name of results unlike those of the study, which have a CPU and a budget of 1; '' for those."""
        return "" if (self.budget, self.device) == (1, "cpu") else f"{self.device}-{self.budget:g}"

    def scaled(self, count: int, tiny: int = 1) -> int:
        """A number of steps, tokens or texts under the budget."""
        return tiny if self.tiny else max(1, round(count * self.budget))


@dataclass(frozen=True)
class Plan:
    """A study, before it runs.

    Args:
        name: Of its results, in lower case with hyphens.
        arms: The arms, controls included, in the order of the table.
        baseline: The arm that the table compares with.
        metrics: The columns of the table.
        claims: What it is to decide.
        seeds: How many seeds.
        run: From an arm, a seed and a job to the metrics.
        settings: What all runs share.
        pilot: The arms of the pilot, which gives the spread of the claims; all by default.
    """

    name: str
    arms: tuple[str, ...]
    baseline: str
    metrics: tuple[str, ...]
    claims: tuple[Claim, ...]
    seeds: int
    run: Callable[[str, int, Job], dict[str, float]]
    settings: dict[str, Any] = field(default_factory=dict)
    pilot: tuple[str, ...] = ()

    def study(self, job: Job | None = None, *, pilot: bool = False, seeds: range | None = None) -> Study:
        """The study with the results that it has so far, those of a CPU with a budget of 1 unless a job says more."""
        output, settings = RESULTS / self.name / ("pilot" if pilot else ""), dict(self.settings)
        if job is not None and job.variant:
            output, settings = output / job.variant, settings | {"budget": job.budget}
        chosen, first = seeds or range(self.seeds), PILOT_SEED if pilot else 0
        options = {"seeds": len(chosen), "settings": settings, "first_seed": first + chosen.start}
        return Study(self.name, self.metrics, self.baseline, output, **options)

    def execute(
        self, job: Job, *, pilot: bool = False, seeds: range | None = None, minutes: float = float("inf")
    ) -> None:
        """Run what has no results yet, and begin no further run after some minutes."""
        study, started = self.study(job, pilot=pilot, seeds=seeds), monotonic()
        for arm, seed in study.runs((self.pilot or self.arms) if pilot else self.arms):
            if monotonic() - started > 60 * minutes:
                break
            study.record(arm, seed, **self.run(arm, seed, job))

    def decided(self) -> str:
        """The block of the claims, with the power that the pilot's spread gives."""
        pilot = self.study(pilot=True)
        lines = [
            f"{self.seeds} seeds. A difference counts if the 95 % interval of the paired mean excludes 0.", "",
            "| arm | against | metric | better is | smallest that counts | pilot's spread | found with 80 % power |",
            "|---|---|---|---|---:|---:|---:|",
        ]  # fmt: skip
        for claim in self.claims:
            spread = claim.spread(pilot)
            lines.append(
                f"| {claim.arm} | {claim.against or self.baseline} | {claim.metric} |"
                f" {'higher' if claim.higher else 'lower'} | {claim.margin:g} | {_number(spread)} |"
                f" {_number(detectable(spread, self.seeds) if spread >= 0 else spread)} |"
            )
        return "\n".join(lines + _tried(RESULTS / self.name / "rates"))

    def results(self) -> str:
        """The block of the results."""
        study = self.study()
        if not study.results:
            return "No results yet."
        claims = ["| claim | improvement, 95 % interval | verdict |", "|---|---|---|", *self.verdicts()]
        runs = sum(len(rows) for rows in study.results.values())
        facts = (
            f"{runs} of {len(self.arms) * self.seeds} planned runs; {core_hours(study):.2f} core-hours, and"
            f" {core_hours(self.study(pilot=True)):.2f} for the pilot."
        )
        return "\n\n".join([study.markdown(), "\n".join(claims), self._by_seed(study), facts])

    def verdicts(self, prefix: str = "") -> list[str]:
        """A row of a table for each claim: what it is about, the interval, the verdict."""
        study, rows = self.study(), []
        for claim in self.claims:
            (low, high), verdict = claim.interval(study), claim.verdict(study)
            found = f"{_number((low + high) / 2)} [{_number(low)}, {_number(high)}] | {verdict}"
            if verdict == UNDECIDED:
                found = found + f" (up to {_number(high)} is possible)" if high == high else " | not run yet"
            rows.append(
                f"{prefix}| {claim.arm} against {claim.against or self.baseline}: {claim.metric},"
                f" {claim.margin:g} or more | {found} |"
            )
        return rows

    def _by_seed(self, study: Study) -> str:
        """The metrics of the claims by seed."""
        seeds = sorted({seed for rows in study.results.values() for seed in rows})
        lines = ["| by seed | " + " | ".join(map(str, seeds)) + " |", "|---" * (len(seeds) + 1) + "|"]
        for metric in dict.fromkeys(claim.metric for claim in self.claims):
            for arm in study.results:
                values = study.values(arm, metric)
                if values:
                    cells = (_number(values[seed]) if seed in values else "" for seed in seeds)
                    lines.append(f"| {metric}, {arm} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def tuning(name: str, job: Job, settings: dict[str, Any] | None = None) -> Study:
    """Where rates are tried before a study: beside its results, or in the folder of a job unlike the study's."""
    unlike = job.variant or ("tiny" if job.tiny else "")
    output = job.work / f"rates-{unlike}" if unlike else RESULTS / name / "rates"
    return Study("rates", (), "", output, settings=settings or {})


def stored(folder: Path) -> dict[str, Any]:
    """What a results file holds, whatever its settings; nothing if there is none."""
    file = folder / "results.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _tried(folder: Path) -> list[str]:
    """A table of the learning rates that were tried, in lines, after an empty one; none if no rate was."""
    tried = stored(folder).get("tried")
    if not tried:
        return []
    rates = sorted({rate for scores in tried.values() for rate in scores}, key=float)
    lines = ["", "| learning rate tried | " + " | ".join(f"{float(rate):g}" for rate in rates) + " |"]
    lines.append("|---" + "|---:" * len(rates) + "|")
    for name, scores in tried.items():
        lines.append(f"| {name} | " + " | ".join(_number(scores.get(rate, float("nan"))) for rate in rates) + " |")
    return lines


def core_hours(study: Study) -> float:
    """What the runs of a study have cost."""
    return sum(sum(rows.values()) for rows in study.cost.values()) / 3600


def _number(value: float) -> str:
    return "" if value != value else f"{value:.4g}"


def summary(plans: dict[str, tuple[Plan, ...]]) -> str:
    """A table of the claims of all pages."""
    lines = ["| study | claim | improvement, 95 % interval | verdict |", "|---|---|---|---|"]
    for page, found in plans.items():
        for plan in found:
            lines += plan.verdicts(f"| [{plan.name}]({page}.md) ")
    return "\n".join(lines)


def replace_block(file: Path, begin: str, block: str) -> None:
    """Renews what stands between a marker and the next end of a block.

    Raises:
        ValueError: The page lacks the block.
    """
    text, end = file.read_text(encoding="utf-8"), "<!-- end -->"
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{file} has no block `{begin} ... {end}`: add it where the block belongs")
    file.write_text(pattern.sub(lambda _: f"{begin}\n\n{block}\n\n{end}", text), encoding="utf-8")


def write_page(file: Path, plans: tuple[Plan, ...]) -> None:
    """Renews the blocks of a page."""
    for plan in plans:
        replace_block(file, f"<!-- decided: {plan.name} -->", plan.decided())
        replace_block(file, f"<!-- results: {plan.name} -->", plan.results())
