"""Lazy logits inside `torch.compile`: an ordinary object, since the compiler cannot trace a tensor that is a recipe.

`TracedLogits` stands for the head's output while torch traces a model, and is what the compiled model returns in
training. Torch functions find it by `__torch_function__`, as they find `LazyLogits`: what models do to their logits
(scale, softcap, casts, slices, a bias) is recorded, losses are computed by the operators of `hf_xent.ops.compiled`, and
any other operation makes the logits part of the compiled program. Outside of the compiler every use goes to `lazy()`,
the `LazyLogits` of the same operands.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..ops import Head, Stats
from ..ops.dispatch import stream_stats
from .graph import Recipe
from .operands import operands_then
from .source import Compute
from .state import PatchState, next_token_labels
from .tensor import LazyLogits, make

METHODS: dict[str, Callable[..., Any]] = {}
"""The methods of a tensor that are recorded or computed without logits; all others are those of the dense tensor."""
RULES: dict[Any, Callable[..., Any]] = {}
"""The same for torch functions; `traced_rules` registers them."""


class TracedLogits:
    """A head's output [..., V] in a compiled program; see the module's docstring.

    Attributes:
        hidden: The hidden states [..., D] that the head was called with.
        raw: The head, without scale and softcap.
        recipe: What follows it.
        dtype: The dtype of its values.
        state: Options and counts of the patched model.
    """

    parent = None  # a compiled program has no views whose memory someone could write to

    def __init__(
        self,
        hidden: Tensor,
        raw: Head,
        recipe: Recipe,
        dtype: torch.dtype,
        state: PatchState,
        operands: dict[str, Tensor],
        snapshot: list[Tensor],
    ):
        self.hidden, self.raw, self.recipe, self.dtype, self.state = hidden, raw, recipe, dtype, state
        self.operands, self.snapshot = operands, snapshot  # what shows whether the head was changed since
        self.values: Tensor | None = None

    @classmethod
    def of(cls, hidden: Tensor, raw: Head, state: PatchState) -> TracedLogits:
        """The twin of `F.linear(hidden, raw.weight, raw.bias)`."""
        operands = {name: x for name, x in raw.tensors.items() if x is not None}
        snapshot = torch.ops.hf_xent.snapshot([x.detach() for x in operands.values()])
        return cls(hidden, raw, Recipe(), raw.dtype_for(hidden.dtype), state, operands, snapshot)

    @property
    def head(self) -> Head:
        """The head, with scale and softcap."""
        return self.recipe.head(self.raw)

    def with_head(self, compute: Compute) -> Any:
        """As `LazyLogits.with_head`: what is computed of hidden states and head."""
        return compute(self.hidden, self.head)

    @property
    def shape(self) -> torch.Size:
        """[..., V]."""
        return torch.Size((*self.hidden.shape[:-1], self.raw.size))

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return self.hidden.ndim

    @property
    def device(self) -> torch.device:
        """Where the operands are."""
        return self.hidden.device

    def dense(self) -> Tensor:
        """The logits as a tensor [..., V], computed once."""
        if self.values is None:
            self.values = self.recipe.value(self.hidden, self.raw).to(self.dtype)
            self.state.reason = "torch.compile traced an operation that needs the logits' values"
        return self.values

    def lazy(self) -> LazyLogits:
        """The same as `LazyLogits`, for use outside of the compiler."""
        operands = operands_then(self.operands, self.snapshot)
        return make(self.hidden, self.raw, self.recipe, self.dtype, self.hidden.device, self.state, operands=operands)

    def stats(
        self,
        labels: Tensor,
        *,
        shift: bool = False,
        outputs: tuple[str, ...] = ("lse", "target", "entropy", "top"),
    ) -> Stats:
        """As `LazyLogits.stats`."""
        if shift:
            labels = next_token_labels(labels)
        return stream_stats(self.hidden, self.head, labels, outputs, self.state.request)

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As of a tensor."""
        return self.ndim

    def contiguous(self) -> TracedLogits:
        """As of a tensor."""
        return self

    def detach(self) -> Any:
        """As of a tensor; the operands lose their gradient, too."""
        if self.values is not None:
            return self.values.detach()
        return self.derived(hidden=self.hidden.detach(), raw=self.raw.detach())

    def derived(self, **changes: Any) -> TracedLogits:
        """The same logits with some attributes changed."""
        names = ("hidden", "raw", "recipe", "dtype", "state", "operands", "snapshot")
        return TracedLogits(*(changes.get(name, getattr(self, name)) for name in names))

    def __getattr__(self, name: str) -> Any:
        if not torch.compiler.is_compiling():
            return getattr(self.lazy(), name)
        rule = METHODS.get(name)
        return getattr(self.dense(), name) if rule is None or self.values is not None else partial(rule, self)

    def __getitem__(self, index: Any) -> Any:
        return METHODS["__getitem__"](self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.dense()[index] = value

    def __mul__(self, other: Any) -> Any:
        return METHODS["mul"](self, other)

    def __rmul__(self, other: Any) -> Any:
        return METHODS["mul"](self, other)

    def __truediv__(self, other: Any) -> Any:
        return METHODS["div"](self, other)

    def __add__(self, other: Any) -> Any:
        return METHODS["add"](self, other)

    def __radd__(self, other: Any) -> Any:
        return METHODS["add"](self, other)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if not torch.compiler.is_compiling():
            return func(*tree_map(_lazy, args), **tree_map(_lazy, kwargs))
        rule = RULES.get(func)
        if rule is not None and isinstance(args[0], TracedLogits):
            return rule(*args, **kwargs)
        return func(*tree_map(dense, args), **tree_map(dense, kwargs))


def _of_values(name: str) -> Callable[..., Any]:
    """An operator of the logits' values."""

    def method(self: TracedLogits, *others: Any) -> Any:
        values: Any = self.dense() if torch.compiler.is_compiling() else self.lazy()
        return getattr(values, name)(*(dense(x) for x in others))

    return method


# Python looks for operators on the class, not by __getattr__
for _name in (
    *("sub", "rsub", "rtruediv", "floordiv", "mod", "pow", "rpow", "matmul", "rmatmul", "neg", "abs", "invert"),
    *("lt", "le", "gt", "ge", "eq", "ne", "and", "or", "len", "iter", "contains", "bool", "float", "int"),
):
    setattr(TracedLogits, f"__{_name}__", _of_values(f"__{_name}__"))
TracedLogits.__hash__ = object.__hash__  # type: ignore[method-assign]  # which __eq__ has taken away


def dense(x: Any) -> Any:
    """The tensor, if x is traced logits, or else x itself."""
    return x.dense() if isinstance(x, TracedLogits) else x


def _lazy(x: Any) -> Any:
    return x.lazy() if isinstance(x, TracedLogits) else x
