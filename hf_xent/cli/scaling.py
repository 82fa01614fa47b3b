"""`hf-xent scaling`: fit laws to the curves of training runs, forecast other runs, draw both, and split compute."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer import Argument, Option

from ..laws import LAWS
from .options import Json
from .output import emit, err

if TYPE_CHECKING:
    from ..experiments.forecasting import Outlook
    from ..laws.fitted import Fit

app = typer.Typer(help="Fit laws of losses, and forecast other runs.", no_args_is_help=True)
FILES_HELP = "CSV files of curves (step,lr,loss,tokens,params), as CurveCallback writes them"
Curves = Annotated[list[Path], Argument(help=f"{FILES_HELP}.", show_default=False)]
Files = Annotated[
    list[Path], Argument(help=f"{FILES_HELP}, or tables with the law's columns and loss.", show_default=False)
]
LawOption = Annotated[
    str, Option(help=f"The law, with options after a colon ('annealing:decay=0.99'): {LAWS.names()}.")
]
X = Annotated[
    str | None, Option(help="For the law 'power': the column that x stands for, such as params, tokens or step.")
]
Points = Annotated[int, Option(help="Mean losses of each curve that a law is fitted to.", min=2)]
Draws = Annotated[int, Option(help="Draws of the bootstrap, for intervals of 95 %; 0 for none.", min=0)]
ScheduleOption = Annotated[
    str,
    Option(help="The schedule as lr_scheduler_type names it, with options: 'warmup_stable_decay:num_decay_steps=200'."),
]
Steps = Annotated[int, Option(help="Optimizer steps of the run to predict.", min=1, show_default=False)]
Peak = Annotated[float | None, Option(help="Its learning rate [default: that of the curves].")]
Warmup = Annotated[int | None, Option(help="Its steps of warm-up [default: those of the curves].", min=0)]


@app.command()
def fit(
    files: Files,
    law: LawOption = "annealing",
    x: X = None,
    points: Points = 100,
    bootstrap: Draws = 200,
    output: Annotated[Path | None, Option(help="JSON file for the fit, which `allocate` reads.")] = None,
    as_json: Json = False,
) -> None:
    """Find the parameters of a law, with their intervals.

    A law of schedules (annealing) reads the learning rate and loss of every step. The others take one row of a curve,
    its end, or rows of a table: 'parametric' needs runs of several sizes and tokens, 'power' a column by --x.

    Example: hf-xent scaling fit runs/constant.csv runs/cosine.csv --law annealing --output fit.json
    """
    found, summary = _fitted(files, law, x, points, bootstrap)
    if output is not None:
        summary["output"] = str(found.save(output))
    emit(summary, _table(summary), found.law.describe(), as_json=as_json)


@app.command()
def forecast(
    files: Curves,
    steps: Steps,
    schedule: ScheduleOption = "cosine",
    peak: Peak = None,
    warmup: Warmup = None,
    law: LawOption = "annealing",
    points: Points = 100,
    bootstrap: Draws = 200,
    output: Annotated[Path | None, Option(help="CSV file for the whole forecast: step,lr,loss,low,high.")] = None,
    as_json: Json = False,
) -> None:
    """Predict the loss at the end of another schedule or of a longer run.

    The band has what noise leaves open in the parameters, not that the law may be wrong: hold out a run to see that.
    Learning rates outside those of the curves are refused, and so is a tail of steps at rate zero.

    Example: hf-xent scaling forecast runs/constant.csv runs/cosine.csv --schedule cosine --steps 20000
    """
    found = _outlook(files, law, (schedule, steps, peak, warmup), (points, bootstrap))
    loss, low, high = found.end
    summary: dict[str, Any] = {
        "schedule": found.schedule.name,
        "options": found.schedule.options,
        "steps": found.schedule.steps,
        "peak": found.schedule.peak,
        "warmup": found.schedule.warmup,
        "loss": loss,
        "low": _number(low),
        "high": _number(high),
        "law": found.fit.law.describe(),
    }
    if output is not None:
        _write(found, output)
        summary["output"] = str(output)
    band = "" if low != low else f" [{low:.4f}, {high:.4f}]"
    line = f"{found.schedule.name}, {found.schedule.steps} steps: loss {loss:.4f}{band.replace('[', chr(92) + '[')}"
    emit(summary, line, f"by {found.fit.law.describe()}".replace("[", r"\["), as_json=as_json)


@app.command()
def plot(
    files: Files,
    law: LawOption = "annealing",
    x: X = None,
    schedule: Annotated[str | None, Option(help="A run to predict, as for `forecast`, with --steps.")] = None,
    steps: Annotated[int | None, Option(help="Optimizer steps of that run.", min=1)] = None,
    measured: Annotated[Path | None, Option(help="The curve of that run, if it has been made.")] = None,
    points: Points = 100,
    bootstrap: Draws = 200,
    output: Annotated[Path, Option(help="The PNG file to write.")] = Path("law.png"),
    as_json: Json = False,
) -> None:
    """Draw runs, the law that was fitted to them, and a forecast with its band.

    Example: hf-xent scaling plot runs/constant.csv runs/cosine.csv --schedule linear --steps 2000 --output law.png
    """
    if (schedule is None) != (steps is None) or (measured is not None and schedule is None):
        raise ValueError(
            f"schedule is {schedule!r}, steps {steps!r}, measured {measured}: a forecast needs the first two"
        )
    from ..experiments import forecasting, law_data, law_figures
    from ..laws import get

    chosen = get(law)
    if forecasting.reads_schedules(chosen):
        curves = forecasting.opened_curves(files)
        if x is not None:
            raise ValueError(f"x is {x!r}, but {type(chosen).__name__} reads schedules: leave x out")
        outlook = None
        if schedule is not None:
            outlook = _outlook(files, law, (schedule, int(steps or 0), None, None), (points, bootstrap))
        with err.status("fitting"):
            found = outlook.fit if outlook else forecasting.fitted(curves, law, points=points, bootstrap=bootstrap)
        made = forecasting.opened_curves(measured)[0] if measured else None
        law_figures.draw_curves(curves, found, output, outlook, points=points, measured=made)
    else:
        if schedule is not None:
            raise ValueError(f"schedule is {schedule!r}, but {type(chosen).__name__} reads none: leave it out")
        found = _fitted(files, law, x, points, bootstrap)[0]
        columns, y = law_data.load_rows(files, chosen, x, points)
        law_figures.draw_columns(found, columns, y, output)
    emit({"output": str(output), "law": found.law.describe()}, f"written: {output}", as_json=as_json)


@app.command()
def allocate(
    fit_file: Annotated[Path, Argument(help="The JSON file of a fit of the law 'parametric'.", show_default=False)],
    compute: Annotated[float, Argument(help="FLOPs of the training.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Tell the model size and the training tokens with the least loss at a compute, by the parametric loss.

    Example: hf-xent scaling allocate fit.json 1e21
    """
    from ..laws.allocation import compute_optimal
    from ..laws.fitted import Fit
    from ..laws.parametric import ParametricLoss

    fitted = Fit.read(fit_file)
    if not isinstance(fitted.law, ParametricLoss):
        raise ValueError(f"{fit_file} has a fit of {type(fitted.law).__name__}: fit the law 'parametric' instead")
    best = compute_optimal(fitted.law, compute)
    summary: dict[str, Any] = {"compute": compute, "params": best.params, "tokens": best.tokens, "loss": best.loss}
    summary["tokens_per_param"] = best.tokens_per_param
    line = f"{best.params:.4g} parameters, {best.tokens:.4g} tokens: loss {best.loss:.4f}"
    ranges = {name: values for name in ("params", "tokens") if (values := fitted.seen.get(name))}
    beyond = [name for name, (low, high) in ranges.items() if not low <= getattr(best, name) <= high]
    summary["extrapolated"] = beyond
    if beyond:
        line += f"; {' and '.join(beyond)} beyond what the law was fitted to"
    emit(summary, line, as_json=as_json)


def _fitted(files: list[Path], law: str, x: str | None, points: int, bootstrap: int) -> tuple[Fit, dict[str, Any]]:
    """A fit, and its summary."""
    from ..experiments import forecasting, law_data
    from ..laws import get
    from ..laws.fitting import fit as fit_law

    chosen = get(law)
    with err.status("fitting"):
        if forecasting.reads_schedules(chosen):
            if x is not None:
                raise ValueError(f"x is {x!r}, but {type(chosen).__name__} reads schedules: leave x out")
            curves = forecasting.opened_curves(files)
            found = forecasting.fitted(curves, chosen, points=points, bootstrap=bootstrap)
        else:
            columns, y = law_data.load_rows(files, chosen, x, points)
            found = fit_law(chosen, columns, y, bootstrap=bootstrap)
    intervals = found.intervals
    parameters = {
        name: {"value": value, **dict(zip(("low", "high"), intervals.get(name, ()), strict=False))}
        for name, value in found.law.values.items()
    }
    size = 100 * float(abs(found.residuals).mean()) if found.law.log_errors else float(abs(found.residuals).mean())
    summary = {"law": law, "formula": found.law.describe(), "parameters": parameters}
    return found, summary | {"points": len(found.residuals), "mean_error": size, "percent": found.law.log_errors}


def _table(summary: dict[str, Any]) -> Table:
    unit = " %" if summary["percent"] else ""
    title = f"{summary['law']}: {summary['points']} points, mean error {summary['mean_error']:.3g}{unit}"
    table = Table("parameter", "value", "95 %", title=title)
    for name, row in summary["parameters"].items():
        interval = f"{row['low']:.5g} to {row['high']:.5g}" if "low" in row else ""
        table.add_row(name, f"{row['value']:.5g}", interval)
    return table


def _outlook(
    files: list[Path], law: str, run: tuple[str, int, float | None, int | None], draws: tuple[int, int]
) -> Outlook:
    """The forecast of a run: schedule, steps, peak and warm-up."""
    from ..experiments.forecasting import Schedule, forecast, opened_curves

    text, steps, peak, warmup = run
    curves = opened_curves(files)
    schedule: Any = text
    if peak is not None or warmup is not None:
        schedule = Schedule.like(curves, text, steps, peak=peak, warmup=warmup)
    with err.status("fitting"):
        return forecast(curves, schedule, steps, law, points=draws[0], bootstrap=draws[1])


def _write(found: Outlook, path: Path) -> None:
    from ..system.files import replace_atomically

    rows = zip(found.step, found.lr[found.step - 1], found.loss, found.low, found.high, strict=True)
    lines = ["step,lr,loss,low,high", *(",".join(repr(value.item()) for value in row) for row in rows)]
    replace_atomically(path, lambda draft: draft.write_text("\n".join(lines) + "\n", encoding="utf-8"))


def _number(value: float) -> float | None:
    """JSON has no nan."""
    return None if value != value else value
