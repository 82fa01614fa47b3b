"""The tensor itself: what it holds, how it becomes dense, and its place in the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..ops import Head, Stats, vocab_stats
from .seam import Seam, next_token_labels

ANSWERS: dict[Any, Callable[..., Any]] = {}
"""Torch function -> what a lazy tensor does instead; see `shapes` and `consumers`."""
METADATA: set[Any] = set()
"""Functions that look at the wrapper alone."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a lazy tensor's value comes from the head's operands."""

    inner: float = 1.0
    outer: float | None = None  # None: no tanh
    log_probs: bool = False  # log_softmax on top

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        """The head with these operands whose activated logits the value is (before any log_softmax)."""
        if self.outer is None:
            return Head(weight, bias, scale=self.inner)
        return Head(weight, bias, scale=self.inner * self.outer, softcap=self.outer)

    def times(self, factor: float) -> Recipe:
        """The recipe of `factor` times the value."""
        if self.outer is None:
            return replace(self, inner=self.inner * factor)
        return replace(self, outer=self.outer * factor)


class LazyLogits(torch.Tensor):
    """A head's output [..., V] that has not been multiplied; see the module's docstring. Made by a patched head."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    recipe: Recipe
    seam: Seam
    parent: tuple[LazyLogits, Callable[[Tensor], Tensor]] | None  # what this is a view of, and how
    made: Tensor | None  # the dense tensor, once something needed it

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        seam: Seam | None = None,
    ) -> LazyLogits:
        """The lazy twin of `F.linear(hidden, weight, bias)`."""
        return make(hidden, weight, bias, Recipe(), hidden.dtype, seam or Seam())

    @property
    def head(self) -> Head:
        """The head whose activated logits of `hidden` this tensor is (before any log_softmax)."""
        return self.recipe.head(self.weight, self.bias)

    @property
    def is_dense(self) -> bool:
        """Whether the dense values exist; from then on they are used, since they may have been written to."""
        return self.made is not None or (self.parent is not None and self.parent[0].is_dense)

    def dense(self) -> Tensor:
        """The ordinary tensor, made once and kept, with autograd."""
        if self.made is None and self.parent is not None and self.parent[0].is_dense:
            self.made = self.parent[1](self.parent[0].dense())
        if self.made is None:
            self.seam.materialized += 1
            with (
                torch.set_grad_enabled(self.requires_grad),
                torch.autocast(self.hidden.device.type, enabled=False),
            ):
                self.made = self._value(self.hidden, self.weight, self.bias)
        return self.made

    def _value(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = self.recipe.head(weight, bias).logits(hidden)
        return (z.log_softmax(-1) if self.recipe.log_probs else z).to(self.dtype)

    def stats(
        self,
        labels: Tensor,
        *,
        shift: bool = False,
        outputs: tuple[str, ...] | None = None,
    ) -> Stats:
        """Every token's statistics, differentiable, in the shape of labels; see `hf_xent.vocab_stats`.

        `labels` are aligned with the logits, as for F.cross_entropy; with `shift=True` they are the model's own labels
        [B, T], and position t is scored against t + 1 (the last one is ignored).
        """
        if shift:
            labels = next_token_labels(labels)
        asked: dict[str, Any] = {} if outputs is None else {"outputs": outputs}
        return vocab_stats(self.hidden, self.head, labels, **asked, **self.seam.options)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # mypy drops keywords' names in dunder methods
        state = "dense" if self.is_dense else "not computed"
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, {state})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ANSWERS and isinstance(args[0] if args else None, LazyLogits) and not args[0].is_dense:
            answer = ANSWERS[func](*args, **kwargs)
            if answer is not NotImplemented:
                return answer
        elif func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*_densify(args), **_densify(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has the C function that stands in for none
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # below autograd: whoever comes here differentiates with respect to the wrapper, and _Lazy.backward takes over
        def value(x: Any) -> Any:
            return x.dense().detach() if isinstance(x, LazyLogits) else x

        return func(*tree_map(value, args), **tree_map(value, kwargs or {}))


class _Lazy(torch.autograd.Function):
    """Gives the wrapper a place in the graph; its backward serves consumers that took dense values below Python."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        recipe: Recipe,
        dtype: Any,
        seam: Seam,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.recipe, ctx.dtype = recipe, dtype
        shape = (*hidden.shape[:-1], weight.shape[0])
        lazy = torch.Tensor._make_wrapper_subclass(LazyLogits, shape, dtype=dtype, device=hidden.device)
        lazy.recipe, lazy.seam, lazy.parent, lazy.made = recipe, seam, None, None
        return lazy

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        leaves = [
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        ]
        hidden, weight, bias = leaves
        with torch.enable_grad():
            z = ctx.recipe.head(weight, bias).logits(hidden)
            value = (z.log_softmax(-1) if ctx.recipe.log_probs else z).to(ctx.dtype)
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        grads = iter(torch.autograd.grad(value, wanted, upstream))
        return (
            *(next(grads) if t is not None and t.requires_grad else None for t in leaves),
            None,
            None,
            None,
        )


def make(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    dtype: torch.dtype,
    seam: Seam,
    parent: Any = None,
) -> LazyLogits:
    """A lazy tensor of these operands, with its place in the graph; `parent` as the attribute."""
    lazy = _Lazy.apply(hidden, weight, bias, recipe, dtype, seam)
    lazy.hidden, lazy.weight, lazy.bias, lazy.parent = hidden, weight, bias, parent
    return lazy


def _densify(tree: Any) -> Any:
    return tree_map(lambda x: x.dense() if isinstance(x, LazyLogits) else x, tree)


_PROPERTIES = (
    "shape dtype device requires_grad grad_fn is_leaf layout ndim is_cuda is_cpu is_sparse is_quantized is_meta"
    " is_nested _version _backward_hooks"
)
_METHODS = (
    "size dim ndimension numel nelement is_floating_point is_complex __len__ get_device register_hook retain_grad"
    " stride is_contiguous element_size storage_offset"
)
_HOOKS: Any = torch.Tensor._backward_hooks  # a descriptor of the class; torch's stub has what it holds on a tensor
METADATA |= torch.overrides.get_default_nowrap_functions()
METADATA |= {getattr(torch.Tensor, name).__get__ for name in _PROPERTIES.split()} | {_HOOKS.__set__}
METADATA |= {getattr(torch.Tensor, name) for name in _METHODS.split()}
METADATA |= {torch.numel, torch.is_floating_point, torch.is_complex}
