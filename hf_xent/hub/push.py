"""Pushes a folder to the Hub: the card last, and then compares the files in the repository with those of the folder.

    card checked offline -> may the login write there? -> repository, branch -> every file but the card -> the card
    -> remote tree == folder

Large folders are uploaded in several commits; the new card comes after all other files, so an interrupted push does not
look like a published model. Pushing again resumes: files that have arrived are not sent again. huggingface_hub handles
tokens (`hf auth login`, HF_TOKEN), and retries after 429, 5xx and broken connections.
"""

from __future__ import annotations

import fnmatch
import glob
from pathlib import Path
from typing import Any

from ..system.access import refusal
from .cards import validate
from .rights import check_token, check_write
from .usage import set_place

CARD = "README.md"
IGNORED = ("checkpoint-*", ".git", ".cache", "__pycache__", "training_args.bin")
"""Names of files and folders that are not sent; the last is a pickle with paths and perhaps a token."""
REMEDIES = {
    401: "log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there: choose another repo_id or a token with write access",
    404: "the token does not see this repository, or the revision does not exist",
    409: "somebody else is writing there: push again",
    412: "somebody else wrote there meanwhile: push again",
    429: "too many requests: wait, then push again to resume",
}
"""HTTP status with which the Hub ends a push -> what to do."""


def files(folder: str | Path) -> dict[str, Path]:
    """The files that a push sends: path in the repository -> file.

    Args:
        folder: The folder that is pushed.
    """
    folder = Path(folder)
    paths = {file.relative_to(folder): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {path.as_posix(): file for path, file in paths.items() if not any(map(_ignored, path.parts))}


def push(
    folder: str | Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Pushes a folder that has a card to the Hub.

    The code on the card then loads from the repository, also in the local folder.

    Args:
        folder: The folder, with a README.md.
        repo_id: The repository, 'user/name', or a name alone for one of the user's; it is made if it does not exist.
        repo_type: 'model' or 'dataset'.
        private: Whether a new repository is private; None for the user's default.
        revision: A branch, which is made if it does not exist.
        create_pr: Whether the change is proposed as a pull request instead of committed.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: For a card with faults (`validate`), or options that exclude each other.
        RuntimeError: With a remedy, if the Hub refuses or not all files have arrived.
    """
    if create_pr and revision is not None:
        raise ValueError(f"revision is {revision!r}, but a pull request goes to main: leave out revision or create_pr")
    validate(folder, repo_type)
    repo = {"repo_id": repo_id, "repo_type": repo_type}
    try:
        check_rights(repo_id, create_pr)
        repo["repo_id"] = _create(folder, repo, private)
        address, branch = _upload(folder, repo, revision, create_pr)
        missing = sorted(set(files(folder)) - _arrived(folder, repo, branch))
    except Exception as error:  # huggingface_hub and its HTTP client raise many types of them
        raise RuntimeError(f"{repo_id} is not published: {_explained(error)}") from error
    if missing:
        raise RuntimeError(f"{repo_id} is not published: {', '.join(missing)} did not arrive as sent; push again")
    return address


def check_rights(repo_id: str, create_pr: bool = False) -> None:
    """Asks the Hub whether the login may write to a repository, before files are sent or a training begins.

    Args:
        repo_id: The repository, 'name', 'user/name' or 'organization/name'.
        create_pr: Whether a pull request is meant, which needs no rights.

    Raises:
        PermissionError: It may not.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        who = HfApi().whoami()
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise
        return  # too many questions, or the Hub does not say: the push tells
    check_token(who)
    if not create_pr:
        check_write(who, repo_id)


def _create(folder: str | Path, repo: dict[str, Any], private: bool | None) -> str:
    """Makes the repository if it does not exist, and names it on the card; returns its name with the user's."""
    from huggingface_hub import HfApi

    name = str(HfApi().create_repo(**repo, private=private, exist_ok=True).repo_id)
    set_place(folder, name)
    return name


def _upload(folder: str | Path, repo: dict[str, Any], revision: str | None, create_pr: bool) -> tuple[str, str | None]:
    """Makes both commits; returns the address of the last, or of the pull request, and the branch that has them."""
    from huggingface_hub import HfApi

    api = HfApi()
    if revision not in (None, "main") and not str(revision).startswith("refs/pr/"):
        api.create_branch(**repo, branch=revision, exist_ok=True)
    common = {**repo, "folder_path": folder}
    others = [glob.escape(name) for name in files(folder) if name != CARD]
    request = None
    if others:
        first = api.upload_folder(
            **common, commit_message="Upload files", revision=revision, create_pr=create_pr, allow_patterns=others
        )
        request, revision, create_pr = first.pr_url, first.pr_revision or revision, False
    last = api.upload_folder(
        **common, commit_message="Upload card", revision=revision, create_pr=create_pr, allow_patterns=[CARD]
    )
    return request or last.pr_url or last.commit_url, revision or last.pr_revision


def _arrived(folder: str | Path, repo: dict[str, Any], branch: str | None) -> set[str]:
    """The paths whose content in the repository equals that in the folder."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils.sha import git_hash, sha_fileobj

    arrived, sent = set(), files(folder)
    for remote in HfApi().list_repo_tree(**repo, revision=branch, recursive=True):
        local = sent.get(remote.path)
        if local is None or remote.size != local.stat().st_size:
            continue
        if remote.lfs is None:
            is_equal = remote.blob_id == git_hash(local.read_bytes())
        else:
            with local.open("rb") as stream:
                is_equal = remote.lfs.sha256 == sha_fileobj(stream).hex()
        arrived |= {remote.path} if is_equal else set()
    return arrived


def _explained(error: BaseException) -> str:
    """The innermost cause in one line, and what to do about it."""
    if (told := refusal(error)) is not None:
        return told
    while error.__cause__ is not None:
        error = error.__cause__
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    words = getattr(response, "headers", {}).get("X-Error-Message") or str(error)
    remedy = REMEDIES.get(status or 0, "" if isinstance(error, PermissionError) else "push again to resume")
    return "; ".join(filter(None, [" ".join(words.split()) or type(error).__name__, remedy]))


def _ignored(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in IGNORED)
