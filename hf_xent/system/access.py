"""Why the Hub refuses, in one sentence with its remedy: gated and private repositories, tokens, offline mode.

Libraries wrap the Hub's answer in errors of their own, so the whole chain of causes is searched for it. The Hub answers
401 to requests without a login for everything that they may not see, whether it exists or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
KINDS = {"datasets": "dataset", "spaces": "space"}


def refusal(error: BaseException) -> str | None:
    """What the Hub refused, and the remedy.

    Args:
        error: An error, which may have been raised from that of huggingface_hub.

    Returns:
        A sentence that names the repository, or None if no refusal of the Hub is among the causes.
    """
    from huggingface_hub import constants, errors

    for cause in _causes(error):
        if isinstance(cause, errors.LocalTokenNotFoundError):
            return f"there is no token: {LOGIN}"
        if constants.HF_HUB_OFFLINE and (
            isinstance(cause, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError)
            or str(cause).endswith("(OfflineModeIsEnabled)")  # of `datasets`, which raises it without its cause
        ):
            return "HF_HUB_OFFLINE is set, and it is not in the cache (HF_HOME): unset it, or download it before"
        if type(cause).__name__ == "DatasetNotFoundError" and (told := _dataset(str(cause))):
            return told
        response = getattr(cause, "response", None)
        if response is None:
            continue
        told, where = str(response.headers.get("X-Error-Message") or ""), _place(str(response.url))
        if "Invalid credentials" in told or "Invalid user token" in str(cause):
            hidden = f", so {where[0]} is not shown" if where else ""
            return f"the token is not valid{hidden}: renew HF_TOKEN, or `hf auth login --force`"
        if where is None:
            continue
        repo, address = where
        if isinstance(cause, errors.GatedRepoError):
            return _gated(repo, address, told, response.status_code)
        if isinstance(cause, errors.RepositoryNotFoundError):
            return _not_found(repo, response.status_code)
        if response.status_code == 403:
            right = "read" if response.request.method in ("GET", "HEAD") else "write"
            return f"{repo}: {told.rstrip('.') or 'forbidden'}: use a token with {right} access ({_settings(address)})"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it came from, the outermost first."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def _place(url: str) -> tuple[str, str] | None:
    """The repository that an address of the Hub is about, with its kind, and the address of its page."""
    found = re.match(
        r"(?P<home>https?://[^/]+)/(?:api/)?(?:(?P<kind>models|datasets|spaces)/)?(?P<repo>[\w.-]+/[\w.-]+)", url
    )
    if found is None or found["repo"].startswith(("api/", "repos/")):
        return None
    kind = found["kind"] if found["kind"] in KINDS else None
    page = f"{found['home']}/{kind + '/' if kind else ''}{found['repo']}"
    return f"the {KINDS.get(kind or '', 'model')} {found['repo']}", page


def _settings(address: str) -> str:
    return "/".join([*address.split("/")[:3], "settings/tokens"])


def _dataset(told: str) -> str | None:
    """A refusal by the text of an error of `datasets`, which it raises without its cause."""
    from huggingface_hub import constants, get_token

    found = re.match(r"Dataset '(?P<repo>[^']+)' (?P<what>is a gated|doesn't exist)", told)
    if found is None:
        return None
    repo, status = f"the dataset {found['repo']}", 403 if get_token() else 401
    if found["what"] == "is a gated":
        return _gated(repo, f"{constants.ENDPOINT}/datasets/{found['repo']}", told, status)
    return _not_found(repo, status)


def _gated(repo: str, address: str, told: str, status: int) -> str:
    if status == 401:
        return f"{repo} is gated: ask for access at {address}, then {LOGIN}"
    if "awaiting" in told:
        return f"{repo} is gated, and your request for access awaits review by its authors: see {address}"
    return (
        f"{repo} is gated, and this login has no access: ask for it at {address}; a fine-grained token also needs"
        " read access to public gated repositories"
    )


def _not_found(repo: str, status: int) -> str:
    if status == 401:
        return f"{repo} does not exist, or is private: check the name; if it is private, {LOGIN}"
    return (
        f"{repo} does not exist, or this login may not see it: check the name; if it is private, use the login or the"
        " token of a member with read access"
    )
