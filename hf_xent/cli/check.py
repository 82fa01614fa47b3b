"""`hf-xent check` and `hf-xent losses`: what a model's head is, what the registry holds."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from typer import Argument, Option

from .app import Json, check_dtype, err, literal, out, prepare, print_json


def check(
    model: Annotated[str, Argument(help="'smollm2', or any Hub id or path of a causal LM.")] = "smollm2",
    dtype: Annotated[str, Option(help="Dtype to load the model in; 'auto' for its own.")] = "auto",
    tokens: Annotated[int, Option(help="Random tokens to compare on.", min=4)] = 24,
    as_json: Json = False,
) -> None:
    """Run a model stock and patched on the same tokens; print its head and how far loss and gradients differ.

    'noise' is how far the stock model is from itself with its head in float64, and 'tolerance' what it allows; the
    'exact' errors are those of both models with their heads in float64, where there is no noise.
    """
    check_dtype(dtype, "auto")
    from ..models import loading
    from ..models.anatomy import check_room
    from ..patching import compare

    prepare(model)
    with err.status(f"comparing {model}"):
        loaded, _ = loading.load(model, dtype=dtype)
        check_room(loaded, tokens, "tokens")
        found = compare(loaded, tokens=tokens)
    if as_json:
        print_json(found.as_dict())
    else:
        table = Table(title=f"{model}", show_header=False)
        for name, value in found.as_dict().items():
            table.add_row(name.replace("_", " "), literal(f"{value:.3g}" if isinstance(value, float) else str(value)))
        out.print(table)
        different = "[bold red]different[/]: do not patch this model, and report it"
        out.print(f"[green]equal[/], {literal(found.way)}" if found.equal else different)
    if not found.equal:
        raise typer.Exit(1)


def losses(
    markdown: Annotated[bool, Option("--markdown", help="A Markdown table, as in the README.")] = False,
    as_json: Json = False,
) -> None:
    """List the registered losses: formula, statistics, source, options."""
    if markdown and as_json:
        raise ValueError("markdown and json are given, and one thing can be printed: leave one of them out")
    from ..losses import table as rows

    found = rows()
    if as_json:
        print_json(found)
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
        table.add_row(row["name"], f"{literal(row['formula'])}\n[dim]{literal(row['source'])}[/]", literal(options))
    out.print(table)
