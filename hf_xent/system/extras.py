"""Optional packages: an error for one that is missing says which extra of hf-xent brings it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution, requires


def missing(extra: str) -> list[str]:
    """The packages of an extra that are not installed, by the metadata of hf-xent; [] if hf-xent itself is not."""
    try:
        requirements = requires("hf-xent") or []
    except PackageNotFoundError:
        return []
    of_extra = re.compile(rf"^([\w.-]+)[^;]*;.*\bextra == ['\"]{extra}['\"]")
    names = [match[1] for match in map(of_extra.match, requirements) if match]
    return sorted(name for name in names if not _installed(name))


@contextmanager
def needed(extra: str) -> Iterator[None]:
    """A context in which the error for a missing module names the extra that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if command := remedy(extra):
            raise ModuleNotFoundError(f"{error}; {command}", name=error.name) from error
        raise


def remedy(extra: str) -> str:
    """The command that installs what an extra lacks; empty if it lacks nothing."""
    return f'pip install "hf-xent[{extra}]"' if missing(extra) else ""


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
