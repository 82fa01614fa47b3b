"""`hf-xent bench` and `hf-xent report`: run the benchmark, and write pages of its results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Argument, Option

from .app import one_line
from .options import Json, Text
from .output import emit, err, out

if TYPE_CHECKING:
    from ..bench import BenchConfig, Row

RESULTS = Path("benchmarks/results")
Source = Annotated[
    str,
    Option(
        help="The model whose activations are used: 'smollm2', a Hub id or path, or a file that --export wrote; or,"
        " with --vocab and --width, 'calibrated' (a softmax like Gemma's; 'calibrated:smollm2') or 'random'."
    ),
]
Shapes = Annotated[
    str | None,
    Option(help="Shapes of 'calibrated' and 'random', N x V x D, in place of these: 8192x256000x2304,8192x9999x512."),
]
Device = Annotated[
    str | None,
    Option(help="cpu, or cuda, where contestants share processes and a killed run goes on [default: cuda if there]."),
]
Export = Annotated[
    Path | None,
    Option(
        help="Measure nothing: write the model's head (int8) and activations (float16) to this .safetensors file,"
        " which --model takes on another machine."
    ),
]


def bench(
    model: Source = "smollm2",
    data: Text = "pydoc",
    tokens: Annotated[
        str | None, Option(help="Number of tokens, N; several, as in '512,1024', for a sweep [default: 1024].")
    ] = None,
    vocab: Annotated[
        str | None, Option(help="Vocabulary of 'calibrated' and 'random', or several for a sweep [default: 4096].")
    ] = None,
    width: Annotated[
        int | None, Option(help="Hidden size of 'calibrated' (256 or more) and 'random' [default: 64].", min=1)
    ] = None,
    shapes: Shapes = None,
    dtype: Annotated[str, Option(help="float32, bfloat16 or float16, or several for a sweep.")] = "float32",
    contestants: Annotated[
        str, Option(help="Comma-separated names; all by default. 'dense' always runs, since the others are compared.")
    ] = "",
    objectives: Annotated[
        str,
        Option(
            help="cross-entropy, softcap, label smoothing, entropy bonus; with a teacher forward kl, reverse kl, jsd;"
            " several, or 'all'."
        ),
    ] = "cross-entropy",
    repeats: Annotated[int, Option(help="Timed iterations of each contestant.", min=1)] = 10,
    device: Device = None,
    patience: Annotated[
        float, Option(help="Seconds for a contestant: on a CPU of timed iterations, on a GPU in all.")
    ] = 60.0,
    limit: Annotated[
        float | None, Option(help="On a GPU: seconds after which no further contestant starts; run again to go on.")
    ] = None,
    threads: Annotated[int | None, Option(help="Threads of torch [default: torch's choice].", min=1)] = None,
    output: Annotated[Path, Option(help="Folder for CSV files, pages and plots.")] = RESULTS,
    export: Export = None,
    as_json: Json = False,
) -> None:
    """Time loss and gradients against other libraries.

    Gradients are checked first; a contestant whose gradients are wrong gets no time.

    Example: hf-xent bench --model calibrated --shapes 8192x256000x2304 --dtype bfloat16 --objectives all
    """
    from ..bench import sweep

    options: dict[str, Any] = {"model": model, "data": data, "repeats": repeats, "patience": patience}
    options |= {name: value for name, value in (("threads", threads), ("device", device)) if value is not None}
    options["contestants"] = tuple(name.strip() for name in contestants.split(",") if name.strip())
    configs = sweep(tokens, vocab, dtype, width=width, shapes=shapes, objectives=objectives, **options)
    if export is not None:
        _export(configs, export, as_json)
    elif configs[0].device == "cuda":
        _measure_shared(configs, output, limit, as_json)
    elif limit is not None:
        raise ValueError(f"limit is {limit:g}, but only on a GPU can a run be cut short: leave it out, or shorten it")
    else:
        _measure(configs, output, as_json)


def _measure(configs: list[BenchConfig], output: Path, as_json: bool) -> None:
    """Run every config; the rows of each are written and shown before the next one starts."""
    from dataclasses import asdict

    from ..bench import progress, run, to_csv, write_page

    rows, files = [], []
    for number, config in enumerate(configs, 1):
        with progress(f"{number}/{len(configs)} {config.shape}" if len(configs) > 1 else "") as report:
            new_rows = run(config, report)
        files = [file for path in to_csv(new_rows, output) for file in (path, *write_page(path))]
        rows += new_rows
        if not as_json:
            out.print(_table(new_rows))
    emit([asdict(row) for row in rows], _written(files), as_json=as_json)


def _measure_shared(configs: list[BenchConfig], output: Path, limit: float | None, as_json: bool) -> None:
    """Run all configs in shared processes; rows are in the journal as they come, and in tables after each shape."""
    from dataclasses import asdict

    from ..bench import Journal, progress, run_shared, to_csv, write_page
    from ..bench.rows import device_name, stem

    path = output / f"{stem(device_name(configs[0].device))}.jsonl"
    journal = Journal(path)
    if journal.rows:
        err.print(
            f"{path} has {len(journal.rows)} rows; those of this commit are not measured again, delete the file"
            " to start over",
            highlight=False,
            soft_wrap=True,
        )
    rows: list[Row] = []
    tables: list[Path] = []
    with progress() as report:
        for new_rows in run_shared(configs, journal, report, float("inf") if limit is None else limit):
            if new_rows:
                rows += new_rows
                tables = to_csv(new_rows, output)
                if not as_json:
                    out.print(_table(new_rows))
    files = [path, *tables]
    try:
        files += [file for table in tables for file in write_page(table)]
    except ImportError as error:  # a machine with a GPU may be without matplotlib
        err.print(f"no page: {one_line(error)}; run `hf-xent report` where it is installed", soft_wrap=True)
    emit([asdict(row) for row in rows], _written(files), as_json=as_json)


def _export(configs: list[BenchConfig], path: Path, as_json: bool) -> None:
    from dataclasses import replace

    from ..bench import inputs

    if len(configs) > 1:
        raise ValueError(f"export is {path}, one file, but {len(configs)} shapes or dtypes are given: give one")
    [config] = configs
    inputs.write_activations(replace(config, device="cpu"), path)
    line = f"{_written([path])} ({path.stat().st_size / 1e6:.0f} MB); the license of {config.model} applies to it"
    emit({"written": [str(path)]}, line, as_json=as_json)


def _written(files: list[Path]) -> str:
    return f"written: {', '.join(str(file) for file in files)}"


def _table(rows: list[Any]) -> Table:
    first = rows[0]
    shape = f"N={first.N}, V={first.V}, D={first.D}, {first.dtype}"
    table = Table(
        title=f"{first.source}: {shape}, {first.objective}, {first.device}",
        caption="extra memory beyond the gradients; ratios to the times of dense torch and the bare matmuls (mm), and"
        " to the size of the logits",
        collapse_padding=True,  # eighty columns are enough
        pad_edge=False,
    )
    for name in ("", "ms", "/ dense", "/ mm", "MiB", "/ logits", "dX err", "dW err"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)

    def number(value: float | None, spec: str) -> str:
        return "" if value is None else format(value, spec)

    for row in rows:
        time = number(row.time_ms, ".0f") if row.status == "ok" else f"[bold red]{row.status}[/]"
        errors = (number(row.hidden_error, ".1e"), number(row.weight_error, ".1e"))
        ratios = (number(row.time_ratio, ".2f"), number(row.matmul_ratio, ".2f"))
        memory = (number(row.peak_mib, ".0f"), number(row.peak_ratio, ".2f"))
        table.add_row(row.contestant, time, *ratios, *memory, *errors)
    return table


def report(
    folder: Annotated[Path, Argument(help="Folder of the CSV files that `hf-xent bench` wrote.")] = RESULTS,
    readme: Annotated[
        Path | None,
        Option(help="File to put the table in, between its two bench comments [default: README.md, if it has these]."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the pages and plots of benchmark results.

    All of them are generated anew from the CSV files that `hf-xent bench` wrote; rows of a run on a GPU that was killed
    before it wrote its CSV file are added from its .jsonl file.

    Example: hf-xent report benchmarks/results --readme README.md
    """
    from ..bench import Journal, to_csv, update_readme, write_page

    for path in sorted(folder.glob("*.jsonl")):
        to_csv(Journal(path).rows.values(), folder)
    files = [file for path in sorted(folder.glob("*.csv")) for file in write_page(path)]
    if not files:
        raise ValueError(f"no results in {folder}: run `hf-xent bench` first, or name the folder that has them")
    try:
        update_readme(readme or Path("README.md"), folder)
        files.append(readme or Path("README.md"))
    except ValueError as error:
        if readme is not None:
            raise
        err.print(f"no table: {one_line(error)}", highlight=False, soft_wrap=True)
    emit({"written": [str(file) for file in files]}, _written(files), as_json=as_json)
