"""`hf-xent data`: registered datasets as folders of Parquet files with a card, and on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from ..data.registered import usages
from .app import Json, err, out, print_json

data = typer.Typer(name="data", help="Write a registered dataset as Parquet with a card, or push it to the Hub.")

Name = Annotated[
    str,
    Argument(
        help=f"One of {usages()}.",
        show_default=False,
    ),
]
Copy = Annotated[
    Path | None, Option("--path", help="A local copy as it was published: folder, zip, JSONL or Parquet file.")
]
Split = Annotated[str | None, Option(help="One split only, or a slice of it such as 'train[:1%]'.")]
Revision = Annotated[str | None, Option(help="Branch, tag or commit of the published dataset.")]


@data.command()
def export(
    name: Name,
    folder: Annotated[Path, Argument(help="A new or empty folder.", show_default=False)],
    path: Copy = None,
    split: Split = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Write the rows in the schema of their family, and a card with what it says about their use."""
    from ..hub.datasets import export as write

    write(name, folder, path, split=split, revision=revision)
    _report({"folder": str(folder)}, as_json)


@data.command()
def push(
    name: Name,
    repo_id: Annotated[str, Option(help="Dataset on the Hub, as user/name; made if it does not exist.")],
    path: Copy = None,
    split: Split = None,
    revision: Revision = None,
    public: Annotated[bool, Option("--public", help="Make a public repository: read the caveat first.")] = False,
    create_pr: Annotated[bool, Option("--create-pr", help="Propose the change instead of making it.")] = False,
    as_json: Json = False,
) -> None:
    """Export, and push what was written: private unless asked otherwise."""
    from ..hub.datasets import to_hub

    with err.status(f"pushing {name} to {repo_id}"):
        address = to_hub(name, repo_id, path, private=not public, create_pr=create_pr, split=split, revision=revision)
    _report({"address": address}, as_json)


def _report(found: dict[str, str], as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        out.print(*found.values(), highlight=False, soft_wrap=True)
