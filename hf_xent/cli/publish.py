"""`hf-xent publish`: a folder with its card to the Hub, or a look at what would go there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from rich.markdown import Markdown
from rich.table import Table
from typer import Argument, Option

from .app import Json, err, out, print_json


def publish(
    folder: Annotated[Path, Argument(help="A folder with README.md: what training or `hf-xent data export` wrote.")],
    repo_id: Annotated[str, Option(help="Where to, as user/name; made if it does not exist.")],
    kind: Annotated[str, Option("--type", help="model or dataset.")] = "model",
    license: Annotated[str | None, Option(help="License for the card, if it does not have the right one.")] = None,
    private: Annotated[bool, Option("--private", help="Make a private repository.")] = False,
    revision: Annotated[str | None, Option(help="Branch, made if it does not exist [default: main].")] = None,
    create_pr: Annotated[bool, Option("--create-pr", help="Propose the change instead of making it.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Check the card, show it and the files; send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Publish a model or dataset: card checked offline, files, then the card, then a look whether all has arrived.

    Log in with `hf auth login` or set HF_TOKEN. After an interruption run the command again: it resumes.
    """
    from .. import hub

    if kind not in hub.REQUIRED:
        raise ValueError(f"type is {kind!r}: choose {' or '.join(hub.REQUIRED)}")
    if license is not None:
        hub.set_license(folder, license)
    hub.validate(folder, kind)
    hub.set_place(folder, repo_id)
    card = hub.validate(folder, kind)
    sizes = {name: file.stat().st_size for name, file in hub.files(folder).items()}
    found: dict[str, Any] = {"repo_id": repo_id, "type": kind, "files": sizes, "address": None}
    if not dry_run:
        with err.status(f"publishing {folder} as {repo_id}"):
            found["address"] = hub.push(
                folder, repo_id, repo_type=kind, private=private or None, revision=revision, create_pr=create_pr
            )
    if as_json:
        print_json(found)
    elif dry_run:
        out.print(Markdown(card.text), _table(repo_id, sizes))
    else:
        out.print(found["address"], highlight=False, soft_wrap=True)


def _table(repo_id: str, sizes: dict[str, int]) -> Table:
    table = Table("file", "bytes", title=f"{repo_id}: nothing was sent")
    for name, size in sizes.items():
        table.add_row(name, f"{size:,}")
    return table
