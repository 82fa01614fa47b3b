"""`hf-xent bench` and `hf-xent report`: measure, and show what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from typer import Argument, Option

from .app import Json, err, out, plain, print_json


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
        print_json([asdict(row) for row in found])
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
        err.print(f"no table: {plain(error)}", highlight=False, soft_wrap=True)
    if as_json:
        print_json({"written": [str(file) for file in files]})
    else:
        _written(files)
