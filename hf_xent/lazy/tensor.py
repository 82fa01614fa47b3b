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

    def head(self, raw: Head) -> Head:
        """The head, on the operands of one without scale, whose activated logits the value is (before log_softmax)."""
        if self.outer is None:
            return replace(raw, scale=self.inner)
        return replace(raw, scale=self.inner * self.outer, softcap=self.outer)

    def value(self, hidden: Tensor, raw: Head) -> Tensor:
        """The dense value."""
        z = self.head(raw).logits(hidden)
        return z.log_softmax(-1) if self.log_probs else z

    def times(self, factor: float) -> Recipe:
        """The recipe of `factor` times the value."""
        if self.outer is None:
            return replace(self, inner=self.inner * factor)
        return replace(self, outer=self.outer * factor)


class LazyLogits(torch.Tensor):
    """A head's output [..., V] that has not been multiplied; see the module's docstring. Made by a patched head."""

    hidden: Tensor  # [..., D]
    raw: Head  # without scale and softcap
    recipe: Recipe
    seam: Seam
    parent: tuple[LazyLogits, Callable[[Tensor], Tensor]] | None  # what this is a view of, and how
    made: Tensor | None  # the dense tensor, once something needed it

    @staticmethod
    def of(hidden: Tensor, raw: Head, seam: Seam | None = None) -> LazyLogits:
        """The lazy twin of `F.linear(hidden, raw.weight, raw.bias)`; the head has no scale and no softcap."""
        return make(hidden, raw, Recipe(), hidden.dtype, hidden.device, seam or Seam())

    @property
    def head(self) -> Head:
        """The head whose activated logits of `hidden` this tensor is (before any log_softmax)."""
        return self.recipe.head(self.raw)

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
                self.made = self.recipe.value(self.hidden, self.raw).to(self.device, self.dtype)
        return self.made

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
        labels = labels.to(self.hidden.device)
        return vocab_stats(self.hidden, self.head, labels, **asked, **self.seam.options).to(self.device)

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
        ctx: Any, raw: Head, recipe: Recipe, dtype: Any, device: Any, seam: Seam, *tensors: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        hollow: dict[str, Any] = dict.fromkeys(("weight", "bias", "adapter"))
        ctx.hollow = replace(raw, **hollow)  # no tensor outlives the graph through ctx
        ctx.recipe, ctx.dtype = recipe, dtype
        hidden = tensors[0]
        assert hidden is not None
        shape = (*hidden.shape[:-1], raw.vocabulary)
        lazy = torch.Tensor._make_wrapper_subclass(LazyLogits, shape, dtype=dtype, device=device)
        lazy.recipe, lazy.seam, lazy.parent, lazy.made = recipe, seam, None, None
        return lazy

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[-len(ctx.saved_tensors) :]
        leaves = [
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip(ctx.saved_tensors, needs, strict=True)
        ]
        hidden, weight, bias, adapter = leaves
        with torch.enable_grad():
            raw = replace(ctx.hollow, weight=weight, bias=bias, adapter=adapter)
            value = ctx.recipe.value(hidden, raw).to(upstream.device, ctx.dtype)
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        grads = iter(torch.autograd.grad(value, wanted, upstream))
        own = (next(grads) if t is not None and t.requires_grad else None for t in leaves)
        return None, None, None, None, None, *own


def make(
    hidden: Tensor,
    raw: Head,
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    seam: Seam,
    parent: Any = None,
) -> LazyLogits:
    """A lazy tensor of these operands, with its place in the graph; `parent` as the attribute.

    `device` is where its values are to be; the operands may lie elsewhere (a model split over devices).
    """
    lazy = _Lazy.apply(raw, recipe, dtype, device, seam, hidden, raw.weight, raw.bias, raw.adapter)
    lazy.hidden, lazy.raw, lazy.parent = hidden, raw, parent
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
