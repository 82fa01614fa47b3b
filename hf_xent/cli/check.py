"""`hf-xent check` and `hf-xent losses`: compare a model with its patched self, and list the registered losses."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from typer import Option

from .app import unpack_packaged
from .options import AutoDType, Json, ModelArgument, check_dtype
from .output import emit, err, literal


def check(
    model: ModelArgument = "smollm2",
    dtype: AutoDType = "auto",
    tokens: Annotated[int, Option(help="How many random tokens to compare on.", min=4)] = 24,
    as_json: Json = False,
) -> None:
    """Compare a model, stock and patched: loss and gradients.

    It is a causal LM, or one like T5 or BERT. Both see the same tokens. The output describes the model's head, and says
    how far loss and gradients differ.

    'noise' is how far the stock model is from itself with its head in float64, and 'tolerance' is the error that this
    noise allows. The 'exact' errors compare both models with their heads in float64, where there is no noise.

    Example: hf-xent check Qwen/Qwen3-0.6B --dtype bfloat16
    """
    check_dtype(dtype, "auto")
    from ..models import loading
    from ..models.anatomy import check_room
    from ..patching import compare

    unpack_packaged(model)
    with err.status(f"comparing {model}"):
        loaded, _ = loading.load(model, dtype=dtype, as_saved=True)
        check_room(loaded, tokens, "tokens")
        comparison = compare(loaded, tokens=tokens)
    table = Table(title=f"{model}", show_header=False)
    for name, value in comparison.as_dict().items():
        table.add_row(name.replace("_", " "), literal(f"{value:.3g}" if isinstance(value, float) else str(value)))
    different = "[bold red]different[/]: do not patch this model, and report it"
    verdict = f"[green]equal[/], {literal(comparison.way)}" if comparison.equal else different
    emit(comparison.as_dict(), table, verdict, as_json=as_json)
    if not comparison.equal:
        raise typer.Exit(1)


def losses(
    classes: Annotated[bool, Option("--classes", help="The losses of classifiers, not those of tokens.")] = False,
    markdown: Annotated[bool, Option("--markdown", help="A Markdown table, as in the README.")] = False,
    as_json: Json = False,
) -> None:
    """List the losses with their formula, source and options.

    Example: hf-xent losses --json
    """
    if markdown and as_json:
        raise ValueError("markdown and json are both given, but only one format can be printed: leave one of them out")
    if classes:
        from ..classes import table as table_of_losses
    else:
        from ..losses import table as table_of_losses

    rows = [{"source": "", **row} for row in table_of_losses()]  # one that a user adds may have none
    if markdown:
        print("\n".join(_of_classes(rows) if classes else _of_tokens(rows)))
        return
    table = Table(title=f"losses{' of classes' if classes else ''} (--json has their help texts)", show_lines=True)
    table.add_column("name", no_wrap=True)
    table.add_column(f"per {'row' if classes else 'token'}, source", overflow="fold")
    if classes:
        table.add_column("labels, needs", overflow="fold")
    table.add_column("options", overflow="fold")
    for row in rows:
        options = "\n".join(f"{name}={value}" for name, value in row["options"].items())
        cells = [row["name"], f"{literal(row['formula'])}\n[dim]{literal(row['source'])}[/]"]
        cells += ["\n".join([row["labels"], *row["needs"]])] if classes else []
        table.add_row(*cells, literal(options))
    emit(rows, table, as_json=as_json)


def _of_tokens(rows: list[dict[str, Any]]) -> list[str]:
    head = ["| loss | per token | statistics | source |", "|---|---|---|---|"]
    return head + [_line(row, row["statistics"], row["source"]) for row in rows]


def _of_classes(rows: list[dict[str, Any]]) -> list[str]:
    """Those that are losses of classes alone as a table, the others by name."""
    from ..classes import OF_STATISTICS

    others = [row for row in rows if row["name"] not in OF_STATISTICS]
    return [
        "| loss | per row, or per batch | labels | needs | source |",
        "|---|---|---|---|---|",
        *(_line(row, row["labels"], ", ".join(row["needs"]), row["source"]) for row in others),
        "",
        f"These losses of tokens are losses of classes, too: {', '.join(f'`{n}`' for n in OF_STATISTICS)}.",
    ]


def _line(row: dict[str, Any], *cells: str) -> str:
    """A line of a Markdown table, whose cells end at a | that is not escaped, also within code."""
    texts = (f"`{row['name']}`", f"`{row['formula']}`", *cells)
    escaped = (text.replace("|", "\\|") for text in texts)
    return f"| {' | '.join(escaped)} |"
