"""The table of what lazy tensors answer themselves, and how a rule in it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

ANSWERS: dict[Any, Answer] = {}
"""Torch function -> what a lazy tensor does instead; `shapes` and `consumers` fill it."""
# NumPy's names of arguments, which torch takes as well
_SPELLINGS = {"axis": "dim", "axis0": "dim0", "axis1": "dim1", "keepdims": "keepdim"}


class Answer:
    """A rule for a torch function: called as the function is, it gives the answer, or NotImplemented.

    NotImplemented, also for arguments that the rule does not know, applies torch's function to the dense tensor: then
    the answer, or the error, is torch's.
    """

    def __init__(self, rule: Callable[..., Any]):
        self.rule, self.signature = rule, inspect.signature(rule)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The answer, or NotImplemented."""
        kwargs = {_SPELLINGS.get(name, name): value for name, value in kwargs.items()}
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError:
            return NotImplemented
        return self.rule(*args, **kwargs)


def register(rules: Mapping[Any, Callable[..., Any]]) -> None:
    """Add rules by torch function."""
    ANSWERS.update({function: Answer(rule) for function, rule in rules.items()})
