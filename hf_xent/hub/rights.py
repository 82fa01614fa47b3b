"""Whether a login may write to a repository, by what the Hub says about it: asked before files are sent.

The Hub refuses a push too, but at its first file or its first commit, which can be hours later.
"""

from __future__ import annotations

from typing import Any


def check_write(who: dict[str, Any], repo_id: str) -> None:
    """Checks that a login may write to a repository.

    What the answer of the Hub does not tell is not refused: the Hub itself decides then.

    Args:
        who: What `HfApi.whoami` returns.
        repo_id: The repository, 'name', 'user/name' or 'organization/name'.

    Raises:
        PermissionError: The scopes of the token do not have the repository, or the user is no member of the
            organization, or a member who only reads.
    """
    user, token = str(who.get("name")), _token(who)
    owner, _, name = repo_id.rpartition("/")
    owner = owner or user
    scoped = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") == "fineGrained" and scoped is not None:
        writable = {str(entry["entity"].get("name")) for entry in scoped if "repo.write" in entry["permissions"]}
        if not writable & {owner, f"{owner}/{name}"}:
            raise PermissionError(
                f"the fine-grained token {token.get('displayName')!r} may write to {_listed(writable) or 'nothing'},"
                f" not to {owner}: give it write access to the repositories of {owner}, or choose another repo_id"
            )
    if owner == user or token.get("role") not in ("write", "fineGrained"):
        return  # other kinds of login do not list the organizations that they may write to
    roles = {org.get("name"): org.get("roleInOrg") for org in who.get("orgs") or []}
    if owner not in roles:
        choices = _listed({user, *map(str, roles)})
        raise PermissionError(f"{user} is no member of {owner}: choose a repo_id under {choices}, or set create_pr")
    if roles[owner] == "read":
        raise PermissionError(
            f"{user} may only read in {owner}: ask its admins for the role 'contributor' or 'write', or set create_pr"
        )


def check_token(who: dict[str, Any]) -> None:
    """Checks that a token may write at all. Raises: PermissionError if it only reads."""
    token = _token(who)
    if token.get("role") == "read":
        name = f"{token.get('displayName')!r} of {who.get('name')}"
        raise PermissionError(f"the token {name} has the role 'read': log in with one that may write")


def _token(who: dict[str, Any]) -> dict[str, Any]:
    """The description of the token of a login; empty for a login of another kind."""
    return (who.get("auth") or {}).get("accessToken") or {}


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
