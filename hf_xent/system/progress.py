"""A progress bar of a loop whose thread ends with the loop, also when an error ends it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.progress import track

T = TypeVar("T")


@contextmanager
def tracked(values: Iterable[T], description: str, **options: Any) -> Iterator[Iterable[T]]:
    """`rich.progress.track`, whose threads end with the context, even after an error in it."""
    bar = track(values, description, **options)
    try:
        yield bar
    finally:
        bar.close()  # type: ignore[attr-defined]  # it is a generator, declared as an iterable
