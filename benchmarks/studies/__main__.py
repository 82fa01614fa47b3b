"""`python -m benchmarks.studies`, run in the root of the repository: studies of the methods, and their pages.

python -m benchmarks.studies run emo            # resumes; docs/results/emo.md says what is decided
python -m benchmarks.studies run emo --pilot    # other seeds: the spread from which the power is computed
python -m benchmarks.studies page emo
python -m benchmarks.studies overview           # the table of docs/results/studies.md
python -m benchmarks.studies compare preferences "SPCE, share of 3" "DPO, majority of 3" KL utility
"""

from __future__ import annotations

from importlib import import_module
from time import monotonic
from typing import Annotated

import typer
from typer import Argument, Option

from benchmarks.studies.plan import PAGES, WORK, Job, Plan, replace_block, summary, write_page

STUDIES = ("emo", "noisefit", "f2c", "preferences", "dxo", "dc_pdd", "ln_free", "sparse_tail", "cce")
"""Each is a module here with its PLANS, and a page of docs/results."""

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
Name = Annotated[str, Argument(help=f"The study: {', '.join(STUDIES)}.")]


def plans(name: str) -> tuple[Plan, ...]:
    """The plans of a page."""
    if name not in STUDIES:
        raise ValueError(f"name is {name!r}: choose from {', '.join(STUDIES)}")
    found: tuple[Plan, ...] = import_module(f"benchmarks.studies.{name}").PLANS
    return found


def chosen_seeds(text: str) -> range | None:
    """The seeds that an option names, '3' or '4:8'; None for all.

    Raises:
        ValueError: It names none.
    """
    if not text:
        return None
    first, _, end = text.rpartition(":")
    if not (end.isdigit() and (first or "0").isdigit() and int(first or 0) < int(end)):
        raise ValueError(f"seeds is {text!r}: give a number of seeds, such as 3, or the first and the end, such as 4:8")
    return range(int(first or 0), int(end))


@app.command()
def run(
    name: Name,
    part: Annotated[str, Option(help="Only this one of its parts, such as 'membership-chinese'.")] = "",
    pilot: Annotated[bool, Option(help="Run the pilot, with other seeds.")] = False,
    seeds: Annotated[str, Option(help="How many, or which ('4:8') beside other processes; all by default.")] = "",
    device: Annotated[str, Option(help="'cpu' or 'cuda'.")] = "cpu",
    budget: Annotated[float, Option(help="A factor on steps, tokens and texts.")] = 1.0,
    minutes: Annotated[float, Option(help="Begin no further run after so many minutes.")] = float("inf"),
) -> None:
    """Run what has no results yet."""
    chosen = [plan for plan in plans(name) if part in ("", plan.name)]
    if not chosen:
        raise ValueError(f"part is {part!r}: choose from {', '.join(plan.name for plan in plans(name))}")
    job, which, end = Job(WORK / name, device=device, budget=budget), chosen_seeds(seeds), monotonic() + 60 * minutes
    for plan in chosen:
        plan.execute(job, pilot=pilot, seeds=which, minutes=(end - monotonic()) / 60)


@app.command()
def compare(
    name: Name,
    arm: Annotated[str, Argument(help="An arm of the study, such as 'DPO'.")],
    against: Annotated[str, Argument(help="The arm that is subtracted.")],
    metrics: Annotated[list[str], Argument(help="Columns of its results.")],
) -> None:
    """Print the mean paired difference of two arms over seeds with its 95 % interval, for what no claim asks."""
    lines = []
    for plan in plans(name):
        study = plan.study()
        for metric in metrics:
            if found := study.difference(arm, metric, against):
                mean, half = found
                lines.append(
                    f"{plan.name}: {metric}, {arm} - {against}: {mean:.4g} [{mean - half:.4g}, {mean + half:.4g}]"
                )
    if not lines:
        raise ValueError(
            f"{arm!r} and {against!r} have no common runs with {metrics}: docs/results/{name}.md has the names"
        )
    print("\n".join(lines))


@app.command()
def page(name: Name) -> None:
    """Renew the blocks of a page from the results."""
    file = PAGES / f"{name}.md"
    write_page(file, plans(name))
    print(f"written: {file}")


@app.command()
def overview() -> None:
    """Renew the table of docs/results/studies.md."""
    file = PAGES / "studies.md"
    replace_block(file, "<!-- summary -->", summary({name: plans(name) for name in STUDIES}))
    print(f"written: {file}")


if __name__ == "__main__":
    app()
