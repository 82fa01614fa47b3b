"""How torch functions are applied to lazy tensors: by their rules, by recording, or else to the dense tensors."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .answers import Answer
from .functions import COMMUTATIVE, DIFFERENTIATING, METADATA, OF_WRAPPER, writes
from .values import LazyTensor, densify, map_lazy, run_on_views

RECORDED: dict[Any, Answer] = {}
"""Torch function -> the rule that records it, or computes what was recorded (`recorded` registers them)."""


class Answering(LazyTensor):
    """A lazy tensor as torch functions see it: `LazyLogits`, and expressions over them."""

    answers: ClassVar[dict[Any, Answer]] = {}
    """Torch function -> the rule that computes it for a tensor of this class without values."""

    @staticmethod
    def check_gradient(call: str, reads: set[int]) -> None:
        """Raises: RuntimeError if `reads` has a tensor whose gradient does not pass through these logits."""
        if reads:
            raise RuntimeError(
                f"{call}: a loss was computed without making these logits, so they do not get its gradient: compute it"
                " from out.logits.dense(), or from a model that is not patched (hf_xent.unpatch)"
            )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():  # values and counts kept here cannot be traced
            return torch.compiler.disable(_answer)(func, args, kwargs)
        return _answer(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has the C function of the base class
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # below autograd: the caller's graph ends at the wrapper, and the backward of its node gets its gradient
        aliased = any(argument.alias_info is not None for argument in func._schema.arguments)

        def value(x: LazyTensor) -> Tensor:
            with torch.overrides.enable_reentrant_dispatch():  # values that are kept need a graph
                return (x.dense() if aliased else x.readable_values()).detach()

        return func(*map_lazy(value, args), **map_lazy(value, kwargs or {}))


def _answer(func: Any, args: Any, kwargs: Any) -> Any:
    kwargs = dict(kwargs or {})
    if not args and isinstance(kwargs.get("input"), Answering):
        args = (kwargs.pop("input"),)
    if func in COMMUTATIVE and len(args) == 2 and isinstance(args[1], Answering) and not kwargs:
        args = args if isinstance(args[0], Answering) else args[::-1]
    first: Any = args[0] if args else None
    rule = first.answers.get(func) if isinstance(first, Answering) else None
    if rule is not None and not first.is_dense:
        answer = rule(*args, **kwargs)
        if answer is not NotImplemented:
            return answer
    elif func in METADATA and (func in OF_WRAPPER or not args[0].has_values):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if func in RECORDED:
        answer = RECORDED[func](*args, **kwargs)
        if answer is not NotImplemented:
            return answer
    return _on_values(func, args, kwargs)


def _on_values(func: Any, args: Any, kwargs: Any) -> Any:
    """Torch's function of the dense tensors, or of the rows that it reads."""
    if func in DIFFERENTIATING:
        for x in tree_leaves((args[1:], kwargs.get("inputs"))):
            if isinstance(x, Answering):
                Answering.check_gradient("the gradient by logits", x.reads - {id(x)})
    if kwargs.get("out") is not None:  # out= has no graph in torch, so values are enough
        return func(*map_lazy(lambda x: x.dense().detach(), args), **densify(kwargs))
    if not writes(func):
        answer = run_on_views(func, args, kwargs)
        if answer is not NotImplemented:
            return answer
    _note_operation(func, args, kwargs)
    answer = func(*densify(args), **densify(kwargs))
    written = writes(func) and isinstance(args[0] if args else None, Answering) and answer is args[0].dense_values
    return args[0] if written else answer  # as an in-place operation returns its tensor


def _note_operation(func: Any, args: Any, kwargs: Any) -> None:
    """Remember that a function needs the values of its lazy arguments, which do not exist yet."""
    for x in tree_leaves((args, kwargs)):
        if isinstance(x, Answering) and not x.has_values:
            x.state.operation = torch.overrides.resolve_name(func) or getattr(func, "__name__", "")
