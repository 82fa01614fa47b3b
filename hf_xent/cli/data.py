"""`hf-xent data`: write registered datasets as Parquet files with a card, push them to the Hub, or select rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from ..data.registered import usages
from .options import CreatePR, Json, Revision
from .output import emit, err
from .select import select

data = typer.Typer(
    name="data",
    help="Export or push a dataset, or select texts for a target.",
)
data.command()(select)

Name = Annotated[
    str,
    Argument(
        help=f"One of {usages()}.",
        show_default=False,
    ),
]
Copy = Annotated[
    Path | None, Option("--path", help="A local copy in its published form: a folder, zip, JSONL or Parquet file.")
]
Split = Annotated[str | None, Option(help="One split only, or a slice of it such as 'train[:1%]'.")]


@data.command()
def export(
    name: Name,
    folder: Annotated[Path, Argument(help="A new or empty folder.", show_default=False)],
    path: Copy = None,
    split: Split = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Write a dataset as Parquet files with a card.

    The rows have the schema of their family, and the card says how they may be used.

    Example: hf-xent data export wikimia out/wikimia --split WikiMIA_length64
    """
    from ..hub.datasets import export as write

    write(name, folder, path, split=split, revision=revision)
    emit({"folder": str(folder)}, str(folder), as_json=as_json)


@data.command()
def push(
    name: Name,
    repo_id: Annotated[str, Option(help="Repository on the Hub, as user/name; it is created if it does not exist.")],
    path: Copy = None,
    split: Split = None,
    revision: Revision = None,
    public: Annotated[
        bool, Option("--public", help="Create a public repository: read the card's caveat first.")
    ] = False,
    create_pr: CreatePR = False,
    as_json: Json = False,
) -> None:
    """Write a dataset with its card, and push both to the Hub.

    The repository is private unless --public is given.

    Example: hf-xent data push pydoc --repo-id me/pydoc
    """
    from ..hub.datasets import to_hub

    with err.status(f"pushing {name} to {repo_id}"):
        address = to_hub(name, repo_id, path, private=not public, create_pr=create_pr, split=split, revision=revision)
    emit({"address": address}, address, as_json=as_json)
