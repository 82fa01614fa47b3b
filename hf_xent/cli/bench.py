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
    from ..bench import BenchConfig

RESULTS = Path("benchmarks/results")


def bench(
    model: Annotated[
        str,
        Option(
            help="The model whose activations are used: 'smollm2', a Hub id or path, or a file that --export wrote; or,"
            " with --vocab and --width, 'calibrated' (a softmax like Gemma's; 'calibrated:smollm2') or 'random'."
        ),
    ] = "smollm2",
    data: Text = "pydoc",
    tokens: Annotated[str, Option(help="Number of tokens, N; several, as in '512,1024', for a sweep.")] = "1024",
    vocab: Annotated[
        str | None, Option(help="Vocabulary of 'calibrated' and 'random', or several for a sweep [default: 4096].")
    ] = None,
    width: Annotated[int, Option(help="Hidden size of 'calibrated' (256 or more) and 'random'.", min=1)] = 64,
    dtype: Annotated[str, Option(help="float32, bfloat16 or float16, or several for a sweep.")] = "float32",
    contestants: Annotated[
        str, Option(help="Comma-separated names; all by default. 'dense' always runs, since the others are compared.")
    ] = "",
    repeats: Annotated[int, Option(help="Timed iterations of each contestant.", min=1)] = 10,
    threads: Annotated[int | None, Option(help="Threads of torch [default: torch's choice].", min=1)] = None,
    output: Annotated[Path, Option(help="Folder for CSV files, pages and plots.")] = RESULTS,
    export: Annotated[
        Path | None,
        Option(
            help="Measure nothing: write the model's head (int8) and activations (float16) to this .safetensors file,"
            " which --model takes on another machine."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Time loss and gradients against dense torch and other libraries.

    Gradients are checked first; a contestant whose gradients are wrong gets no time.

    Example: hf-xent bench --model random --vocab 32000,128000 --width 512 --dtype bfloat16
    """
    from ..bench import sweep

    options: dict[str, Any] = {} if threads is None else {"threads": threads}
    options["contestants"] = tuple(name.strip() for name in contestants.split(",") if name.strip())
    configs = sweep(tokens, vocab, dtype, model=model, data=data, width=width, repeats=repeats, **options)
    if export is None:
        _measure(configs, output, as_json)
    else:
        _export(configs, export, as_json)


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
    table = Table(
        title=f"{first.source}: N={first.N}, V={first.V}, D={first.D}, {first.dtype}, {first.device}",
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
    """Write the pages, plots and README table of benchmark results.

    All of them are generated anew from the CSV files that `hf-xent bench` wrote.

    Example: hf-xent report benchmarks/results --readme README.md
    """
    from ..bench import update_readme, write_page

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
