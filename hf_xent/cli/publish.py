"""`hf-xent publish`: push a folder with its card to the Hub, or show what would be pushed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.table import Table
from typer import Argument, Option

from .options import CreatePR, Json
from .output import emit, err


def publish(
    folder: Annotated[Path, Argument(help="A folder with README.md, as written by training or `hf-xent data export`.")],
    repo_id: Annotated[str, Option(help="Repository on the Hub, as user/name; it is created if it does not exist.")],
    kind: Annotated[str, Option("--type", help="What the repository holds: model or dataset.")] = "model",
    license: Annotated[str | None, Option(help="License for the card, if it does not have the right one.")] = None,
    private: Annotated[bool, Option("--private", help="Create a private repository.")] = False,
    revision: Annotated[
        str | None, Option(help="Branch to push to, created if it does not exist [default: main].")
    ] = None,
    create_pr: CreatePR = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check the card, show it and the files, and send nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Publish a model or dataset with its card on the Hub.

    The card is checked offline, then the files are sent, then the card; at the end their arrival is verified.

    Log in with `hf auth login` or set HF_TOKEN. After an interruption, run the command again: it resumes.

    Example: hf-xent publish out/train --repo-id me/my-model --license apache-2.0 --dry-run
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
    result = {"repo_id": repo_id, "type": kind, "files": sizes}
    if dry_run:
        from rich.markdown import Markdown

        emit({**result, "address": None}, Markdown(card.text), _table(repo_id, sizes), as_json=as_json)
        return
    with err.status(f"publishing {folder} as {repo_id}"):
        address = hub.push(
            folder, repo_id, repo_type=kind, private=private or None, revision=revision, create_pr=create_pr
        )
    emit({**result, "address": address}, address, as_json=as_json)


def _table(repo_id: str, sizes: dict[str, int]) -> Table:
    table = Table("file", "bytes", title=f"{repo_id}: nothing was sent")
    for name, size in sizes.items():
        table.add_row(name, f"{size:,}")
    return table
