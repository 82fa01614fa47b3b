"""The tensor itself: what it holds, how it becomes dense, and its place in the graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..ops import Head, Stats
from ..ops.dispatch import stream_stats
from ..ops.higher import composed
from .answers import ANSWERS
from .graph import Connected, Recipe, Values, without_hooks
from .operands import Operands, check, operands_of, version
from .state import PatchState, next_token_labels

COMMUTATIVE = {torch.add, torch.mul, torch.multiply, *(getattr(torch.Tensor, name) for name in ("add", "mul"))}
"""Functions of two tensors that give the same in either order: a lazy tensor's answer is looked up by the first."""
METADATA: set[Any] = set()
"""Functions that look at the wrapper alone."""
_SCALARS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))


class LazyLogits(torch.Tensor):
    """A head's output [..., V] that has not been multiplied; see the module's docstring. Made by a patched head."""

    hidden: Tensor  # [..., D]
    raw: Head  # without scale and softcap
    recipe: Recipe
    state: PatchState
    differentiable: bool  # whether its values have a graph
    parent: tuple[LazyLogits, Callable[[Tensor], Tensor]] | None  # the tensor whose memory this is a view of, and how
    made: Tensor | None  # the dense tensor, once something needed it
    copied: Tensor | None  # the values of a view that was only read, without those of the tensor it is a view of
    operands: Operands  # what the head was called with, as it was
    memory: list[Tensor]  # `made`, where the wrapper's place in the graph can see whether it was written to
    reads: set[int]  # ids of those that gave something differentiable of their own; all of a head's output share it

    @staticmethod
    def of(hidden: Tensor, raw: Head, state: PatchState | None = None) -> LazyLogits:
        """The lazy twin of `F.linear(hidden, raw.weight, raw.bias)`; the head has no scale and no softcap."""
        return make(hidden, raw, Recipe(), hidden.dtype, hidden.device, state or PatchState())

    @property
    def head(self) -> Head:
        """The head whose activated logits of `hidden` this tensor is (before any log_softmax).

        Raises: RuntimeError if one of its tensors, or `hidden`, was changed in place since it was called.
        """
        self._check()
        self._read_apart(id(self.reads))
        return self.recipe.head(self.raw)

    @property
    def seam(self) -> PatchState:
        """The earlier name of `state`."""
        warnings.warn("LazyLogits.seam is now LazyLogits.state: use the new name", DeprecationWarning, stacklevel=2)
        return self.state

    def _check(self) -> None:
        check(self.operands, unread=self.differentiable and not self.reads)

    def _read_apart(self, whose: int) -> None:
        """Remember that something differentiable was made of the operands without the dense logits."""
        if self.differentiable and torch.is_grad_enabled():
            self.reads.add(whose)

    @property
    def is_dense(self) -> bool:
        """Whether the dense values exist; from then on they are used, since they may have been written to.

        They are also made of what a custom autograd function returned: only the wrapper has its place in the graph.
        """
        if self.made is None and _requires_grad(self) and not self.differentiable:
            self.made = Values.apply(self)
        return self.has_values

    @property
    def has_values(self) -> bool:
        """Whether the dense values were made, or those of what this is a view of."""
        return self.made is not None or (self.parent is not None and self.parent[0].has_values)

    def dense(self) -> Tensor:
        """The ordinary tensor, made once and kept, with autograd. A view's shares the memory of what it is a view of.

        Raises: RuntimeError if the values do not exist yet and an operand was changed in place meanwhile.
        """
        if self.is_dense and self.made is not None:
            return self.made
        if self.parent is not None:
            base = self.parent[0].dense()
            with torch.set_grad_enabled(self.differentiable):
                self.made = self.parent[1](base)
        else:
            self.made = self._value()
        self.memory.append(self.made)
        self.copied = None
        return self.made

    def _values(self) -> Tensor:
        """The dense values, to be read only: those of a few rows are computed without the rest."""
        if self.is_dense or not self._is_part():
            return self.dense()
        self._read_apart(id(self))
        if self.copied is None:
            with torch.inference_mode(False):  # where tensors count how often they are written to
                self.copied = self._value()
        return self.copied

    def _is_part(self) -> bool:
        """Whether this is a view that costs less to compute than what it is a view of."""
        base = self
        while base.parent is not None:
            base = base.parent[0]
        return self.numel() < base.numel() or self.differentiable != base.differentiable

    def _value(self) -> Tensor:
        self._check()
        self.state.materialized += 1
        kind = self.hidden.device.type
        with torch.set_grad_enabled(self.differentiable), torch.autocast(kind, enabled=False), without_hooks():
            return self.recipe.value(self.hidden, self.raw).to(self.device, self.dtype)

    def stats(
        self,
        labels: Tensor,
        *,
        shift: bool = False,
        outputs: tuple[str, ...] = ("lse", "target", "entropy", "top"),
    ) -> Stats:
        """Every token's statistics, differentiable, in the shape of labels; see `hf_xent.vocab_stats`.

        `labels` are aligned with the logits, as for F.cross_entropy; with `shift=True` they are the model's own labels
        [B, T], and position t is scored against t + 1 (the last one is ignored).
        """
        if shift:
            labels = next_token_labels(labels)
        labels = labels.to(self.hidden.device)
        return stream_stats(self.hidden, self.head, labels, outputs, self.state.request).to(self.device)

    def retain_grad(self) -> None:
        """Keep the gradient of these logits in `.grad`, as torch does; it makes them dense.

        Raises: RuntimeError if a loss was computed without them before, so that no gradient passes through them.
        """
        self._check_gradient("logits.retain_grad()", self.reads)
        self.dense().retain_grad()

    def register_hook(self, hook: Callable[[Tensor], Any]) -> Any:
        """Call `hook` with the gradient of these logits, as torch does, which makes them dense.

        Not for FSDP, which hooks every output of a module to gather its weights: the head's are kept until the backward
        anyway.

        Raises: RuntimeError as `retain_grad`.
        """
        of_fsdp = str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("torch.distributed.")
        if not self.is_dense and of_fsdp:
            with torch._C.DisableTorchFunctionSubclass():
                return super().register_hook(hook)
        self._check_gradient("logits.register_hook()", self.reads)
        return self.dense().register_hook(hook)

    @staticmethod
    def _check_gradient(asked: str, reads: set[int]) -> None:
        """Raises: RuntimeError if there are reads through which a gradient passes these logits by."""
        if reads:
            raise RuntimeError(
                f"{asked}: a loss was computed without making these logits, so they do not get its gradient: compute it"
                " from out.logits.dense(), or from a model that is not patched (hf_xent.unpatch)"
            )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # mypy drops keywords' names in dunder methods
        state = "dense" if self.is_dense else "not computed"
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, {state})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():  # what is kept and counted here is no part of a graph
            return torch.compiler.disable(cls._answer)(func, args, kwargs)
        return cls._answer(func, args, kwargs)

    @classmethod
    def _answer(cls, func: Any, args: Any, kwargs: Any) -> Any:
        kwargs = dict(kwargs or {})
        if not args and isinstance(kwargs.get("input"), LazyLogits):
            args = (kwargs.pop("input"),)
        if func in COMMUTATIVE and len(args) == 2 and isinstance(args[1], LazyLogits) and not kwargs:
            args = args if isinstance(args[0], LazyLogits) else args[::-1]
        if func in ANSWERS and isinstance(args[0] if args else None, LazyLogits) and not args[0].is_dense:
            answer = ANSWERS[func](*args, **kwargs)
            if answer is not NotImplemented:
                return answer
        elif func in METADATA and (func in _OF_WRAPPER or not args[0].has_values):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _DIFFERENTIATING:
            for x in tree_leaves((args[1:], kwargs.get("inputs"))):
                if isinstance(x, LazyLogits):
                    cls._check_gradient("the gradient by logits", x.reads - {id(x)})
        if kwargs.get("out") is not None:  # what is written there has no graph, so it takes values alone
            return func(*_each(lambda x: x.dense().detach(), args), **_densify(kwargs))
        if not _writes(func):
            found = _read(func, args, kwargs)
            if found is not NotImplemented:
                return found
        answer = func(*_densify(args), **_densify(kwargs))
        written = _writes(func) and isinstance(args[0] if args else None, LazyLogits) and answer is args[0].made
        return args[0] if written else answer  # as an in-place operation returns its tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has the C function that stands in for none
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # below autograd: whoever comes here differentiates with respect to the wrapper; Connected.backward takes over
        aliased = any(argument.alias_info is not None for argument in func._schema.arguments)

        def value(x: LazyLogits) -> Tensor:
            with torch.overrides.enable_reentrant_dispatch():  # what is kept has a graph
                return (x.dense() if aliased else x._values()).detach()

        return func(*_each(value, args), **_each(value, kwargs or {}))


def _writes(func: Any) -> bool:
    """Whether a torch function may write to its arguments, or hands out their memory: told by its name."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    may_be = "inplace" in getattr(getattr(func, "__code__", None), "co_varnames", ())
    return in_place or may_be or name.startswith("as_strided") or func in _HANDS_OUT or name == "__set__"


def _read(func: Any, args: Any, kwargs: Any) -> Any:
    """What a function gives that only reads its lazy arguments; NotImplemented if it does more, or if none is a view.

    It runs on the values of views alone. Where its result shares their memory, or they were written to, the function
    has to run again on the memory of what they are views of.
    """
    lazies = [x for x in tree_leaves((args, kwargs)) if isinstance(x, LazyLogits)]
    if composed() or all(x.is_dense or not x._is_part() for x in lazies):
        return NotImplemented
    values = [x._values() for x in lazies]
    versions, memory = [version(v) for v in values], {v.untyped_storage()._cdata for v in values}
    found = func(*_each(LazyLogits._values, args), **_each(LazyLogits._values, kwargs))
    if not all(_is_apart(leaf, memory) for leaf in tree_leaves(found)):
        return NotImplemented
    if versions != [version(v) for v in values]:
        for x in lazies:
            x.copied = None  # it holds what should be written elsewhere
        return NotImplemented
    return found


def _is_apart(leaf: Any, memory: set[int]) -> bool:
    """Whether a part of a result has nothing to do with these storages."""
    if not isinstance(leaf, Tensor):
        return isinstance(leaf, _SCALARS)
    return type(leaf) is Tensor and (leaf.layout != torch.strided or leaf.untyped_storage()._cdata not in memory)


def make(  # noqa: PLR0913  what a lazy tensor holds
    hidden: Tensor,
    raw: Head,
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    state: PatchState,
    *,
    parent: Any = None,
    layout: Tensor | None = None,
    reads: set[int] | None = None,
    operands: Operands | None = None,
) -> LazyLogits:
    """A lazy tensor of these operands, with its place in the graph; `parent`, `reads`, `operands` as the attributes.

    `device` is where its values are to be; the operands may lie elsewhere (a model split over devices). `layout` is a
    tensor that has its strides, by default a view's or those of a contiguous tensor.
    """
    if parent is not None:
        layout = parent[1](shadow(parent[0]))
    elif layout is None:
        layout = torch.empty((*hidden.shape[:-1], raw.vocabulary), device="meta")
    place = {"dtype": dtype, "device": device}
    lazy = Connected.apply(LazyLogits, raw, recipe, layout, place, hidden, raw.weight, raw.bias, raw.adapter)
    lazy.parent, lazy.made, lazy.copied = None, None, None
    lazy.differentiable, lazy.parent = _requires_grad(lazy), parent
    lazy.operands = operands_of(hidden, raw) if operands is None else operands
    if not lazy.differentiable:  # nor is what will be made of it, where gradients are wanted
        hidden, raw = hidden.detach(), raw.detach()
    lazy.hidden, lazy.raw, lazy.recipe, lazy.state = hidden, raw, recipe, state
    lazy.reads = set() if reads is None else reads
    return lazy


def shadow(x: LazyLogits) -> Tensor:
    """A tensor without values that is laid out as x: what torch does to it tells what it would do to x's values."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def is_view(result: Tensor, base: Tensor) -> bool:
    """Whether a result shares the memory of `base`."""
    return result.untyped_storage()._cdata == base.untyped_storage()._cdata


def _requires_grad(lazy: LazyLogits) -> bool:
    """Whether the wrapper is part of a graph."""
    with torch._C.DisableTorchFunctionSubclass():
        return lazy.requires_grad


def _each(fn: Callable[[LazyLogits], Tensor], tree: Any) -> Any:
    return tree_map(lambda x: fn(x) if isinstance(x, LazyLogits) else x, tree)


def _densify(tree: Any) -> Any:
    return _each(LazyLogits.dense, tree)


_PROPERTIES = (
    "shape dtype device requires_grad grad_fn is_leaf layout ndim is_cuda is_cpu is_sparse is_quantized is_meta"
    " is_nested _version _backward_hooks"
)
_METHODS = (
    "size dim ndimension numel nelement is_floating_point is_complex __len__ get_device"
    " stride is_contiguous element_size"
)
_HOOKS: Any = torch.Tensor._backward_hooks  # a descriptor of the class; torch's stub has what it holds on a tensor
METADATA |= torch.overrides.get_default_nowrap_functions()
METADATA |= {getattr(torch.Tensor, name).__get__ for name in _PROPERTIES.split()} | {_HOOKS.__set__}
METADATA |= {getattr(torch.Tensor, name) for name in _METHODS.split()}
METADATA |= {torch.numel, torch.is_floating_point, torch.is_complex}
_OF_WRAPPER = {_HOOKS.__get__, _HOOKS.__set__}  # the others are asked of the dense values, once there are some
_DIFFERENTIATING = {torch.autograd.grad, torch.autograd.backward}  # (what, with respect to what)
_HANDS_OUT = {torch.Tensor.data_ptr, torch.Tensor.storage_offset, torch.Tensor.__setitem__, torch.Tensor.data.__get__}  # type: ignore[attr-defined]
