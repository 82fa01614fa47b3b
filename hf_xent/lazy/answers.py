"""The torch functions that lazy tensors compute by rules of their own, and how such a rule is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

ANSWERS: dict[Any, Answer] = {}
"""Torch function -> the rule that computes it for a lazy tensor; `shapes` and `consumers` register theirs."""
# NumPy's names of arguments, which torch accepts as well
_NUMPY_NAMES = {"axis": "dim", "axis0": "dim0", "axis1": "dim1", "keepdims": "keepdim"}


class Answer:
    """A rule for a torch function: it takes the function's arguments and returns its result, or NotImplemented.

    After NotImplemented, also returned for arguments that the rule does not have, torch's function is applied to the
    dense tensor: then the result, or the error, is torch's.
    """

    def __init__(self, rule: Callable[..., Any]):
        self.rule, self.signature = rule, inspect.signature(rule)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result, or NotImplemented."""
        kwargs = {_NUMPY_NAMES.get(name, name): value for name, value in kwargs.items()}
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError:
            return NotImplemented
        return self.rule(*args, **kwargs)


def register(rules: Mapping[Any, Callable[..., Any]]) -> None:
    """Add rules by torch function."""
    ANSWERS.update({function: Answer(rule) for function, rule in rules.items()})
