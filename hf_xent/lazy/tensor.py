"""`LazyLogits`: how it is made, and its methods beyond torch's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import Head, Stats
from ..ops.dispatch import stream_stats
from .answering import Answering
from .answers import ANSWERS
from .graph import Connected, Recipe
from .operands import Operands, operands_of
from .source import Compute, Source, copied
from .state import PatchState, next_token_labels
from .values import is_view, meta_like, requires_grad_of
from .wrappers import Hook, hooked, is_of_wrapper

_ATTRIBUTES = (
    *("hidden", "raw", "source", "product_of", "operands"),
    *("recipe", "dtype", "device", "state", "reads", "hooks"),
)


class LazyLogits(Answering):
    """A head's output [..., V] that has not been computed; see `hf_xent.lazy`. A patched head returns it.

    Attributes:
        hidden: The hidden states [..., D] that the head was called with.
        head: The head that turns them into logits.
        state: Options and counts, shared by all lazy logits of a model.
        is_dense: Whether the dense values exist.
    """

    answers = ANSWERS

    @staticmethod
    def of(hidden: Tensor, raw: Head, state: PatchState | None = None, *, source: Source | None = None) -> LazyLogits:
        """The lazy twin of `F.linear(hidden, raw.weight, raw.bias)`.

        Args:
            hidden: The input of the head, [..., D].
            raw: The head, without scale and softcap.
            state: Options and counts; None makes new ones.
            source: Where the weights are if they are there only during a call of the head (`hf_xent.lazy.source`);
                `raw` then has meta tensors.

        Returns:
            Lazy logits [..., V].
        """
        dtype = raw.dtype_for(hidden.dtype)
        return make(hidden, raw, Recipe(), dtype, hidden.device, state or PatchState(), source=source)

    @property
    def head(self) -> Head:
        """The head, with scale and softcap, whose logits of `hidden` this tensor is (before any log_softmax).

        A copy, if its weights are there only while it is called (ZeRO-3, FSDP, offloading); `with_head` needs none.

        Raises:
            RuntimeError: One of its tensors, or `hidden`, was changed in place since the head was called.
        """
        return self.with_head(lambda _, head: head) if self.source is None else self.with_head(copied)

    def with_head(self, compute: Compute) -> Any:
        """The result of a computation from hidden states and head, in a call of the head if its weights need that.

        Args:
            compute: Called with `hidden` and `head`, once. It returns tensors, statistics, or tuples of them.

        Returns:
            Its result.

        Raises:
            RuntimeError: As for `head`.
        """
        if not self.is_dense:  # also continues the graph through the function of a wrapper
            self.check_operands()
        self.note_read(id(self.reads))
        result = self.with_raw(lambda hidden, raw: compute(hidden, self.recipe.head(raw)))
        return result if isinstance(result, Head) and self.source is None else hooked(self.hooks, result)

    @property
    def seam(self) -> PatchState:
        """The earlier name of `state`."""
        warnings.warn("LazyLogits.seam is now LazyLogits.state: use the new name", DeprecationWarning, stacklevel=2)
        return self.state

    def stats(
        self,
        labels: Tensor,
        *,
        shift: bool = False,
        outputs: tuple[str, ...] = ("lse", "target", "entropy", "top"),
    ) -> Stats:
        """Every token's statistics, differentiable, without logits; see `hf_xent.vocab_stats`.

        Args:
            labels: Token ids aligned with the logits, [...], as for F.cross_entropy.
            shift: Whether labels are the model's own [B, T] instead: position t is scored against t + 1, and the last
                one is ignored.
            outputs: Names of statistics, out of `hf_xent.ops.STATISTICS`.

        Returns:
            Statistics in the shape of labels, on the logits' device.

        Raises:
            ValueError: As in `hf_xent.vocab_stats`.
            RuntimeError: An operand was changed in place since the head was called.
        """
        if shift:
            labels = next_token_labels(labels)
        request = self.state.request
        return self.with_head(
            lambda hidden, head: stream_stats(hidden, head, labels.to(hidden.device), outputs, request)
        ).to(self.device)

    def retain_grad(self) -> None:
        """Keep the gradient of these logits in `.grad`, as in torch; this makes them dense.

        Raises:
            RuntimeError: A loss was computed without them before, so no gradient passes through them.
        """
        self.check_gradient("logits.retain_grad()", self.reads)
        self.dense().retain_grad()

    def register_hook(self, hook: Callable[[Tensor], Any]) -> Any:
        """Call a hook with the gradient of these logits, as in torch; this makes them dense.

        Hooks that FSDP and DeepSpeed put on every output do not: see `hf_xent.lazy.wrappers`.

        Args:
            hook: Called with the gradient [..., V]; it may return another one.

        Returns:
            A handle that removes the hook.

        Raises:
            RuntimeError: As in `retain_grad`.
        """
        if not self.is_dense and is_of_wrapper(hook):
            self.hooks.append(hook)
            if self.hidden.requires_grad:  # of what is computed from `hidden` alone; their scaling would come too late
                self.hidden.register_hook(lambda gradient: (hook(gradient), None)[1])
            with torch._C.DisableTorchFunctionSubclass():
                return super().register_hook(hook)
        self.check_gradient("logits.register_hook()", self.reads)
        return self.dense().register_hook(hook)

    def derived(self, **changes: Any) -> LazyLogits:
        """A lazy tensor with some attributes changed: a copy, unless a `parent` is passed that it is a view of."""
        attributes = {name: getattr(self, name) for name in _ATTRIBUTES}
        same_shape = changes.keys() <= {"raw", "source", "recipe", "dtype", "device"}
        layout = torch.empty_like(meta_like(self)) if same_shape else None  # with the strides of torch's result
        if "hidden" in changes:  # other rows than those of the product
            attributes["product_of"] = None
        return make(**{**attributes, "layout": layout, **changes})

    def with_rows(self, change: Callable[[Tensor], Tensor], on_dense: Callable[[Tensor], Tensor]) -> LazyLogits:
        """Other rows: a view if the same operation gives a view of the dense tensor, else a copy."""
        dense = meta_like(self)
        parent = (self, on_dense) if is_view(on_dense(dense), dense) else None
        return self.derived(hidden=change(self.hidden), parent=parent)

    def copied(self, *, contiguous: bool = False) -> LazyLogits:
        """The same values in memory of their own, with these strides or those of a contiguous tensor."""
        return self.derived(layout=None) if contiguous else self.derived()

    def cast(self, dtype: torch.dtype) -> LazyLogits:
        """The same numbers in another dtype."""
        return self.derived(dtype=dtype)

    def detached(self) -> LazyLogits:
        """A view without a graph."""
        return self.derived(
            hidden=self.hidden.detach(), raw=self.raw.detach(), parent=(self, lambda dense: dense.detach())
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # mypy drops keywords' names in dunder methods
        state = "dense" if self.is_dense else "not computed"
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, {state})"


def make(  # noqa: PLR0913  the attributes of a lazy tensor
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
    source: Source | None = None,
    product_of: Tensor | None = None,
    hooks: list[Hook] | None = None,
) -> LazyLogits:
    """A lazy tensor of these operands, connected to the graph; `parent` and what follows it as in `LazyTensor`.

    `device` is where its values will be; the operands may be elsewhere (a model split over devices). `layout` is a
    tensor with the strides it gets, by default those of a view of `parent` or of a contiguous tensor.
    """
    if parent is not None:
        layout = parent[1](meta_like(parent[0]))
    elif layout is None:
        layout = torch.empty((*hidden.shape[:-1], raw.vocabulary), device="meta")
    options = {"dtype": dtype, "device": device}
    lazy = Connected.apply(LazyLogits, raw, recipe, layout, options, hidden, *raw.tensors.values())
    lazy.parent, lazy.dense_values, lazy.copied_values = None, None, None
    lazy.differentiable, lazy.parent = requires_grad_of(lazy), parent
    lazy.operands = operands_of(hidden, raw) if operands is None else operands
    if not lazy.differentiable:  # nor is anything computed from it, even with gradients enabled
        hidden, raw = hidden.detach(), raw.detach()
    lazy.hidden, lazy.raw, lazy.recipe, lazy.state = hidden, raw, recipe, state
    lazy.reads = set() if reads is None else reads
    lazy.product_of = hidden if raw.adapter is None else product_of
    lazy.source, lazy.hooks = source, [] if hooks is None else hooks
    return lazy
