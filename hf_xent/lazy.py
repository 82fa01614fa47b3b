"""Logits that take their own loss.

`LazyLogits` has the shape, dtype and device of a head's output and holds (hidden, weight, bias); nothing is multiplied.
What a causal LM does to its logits on the way to the loss is recorded:

    value = inner * raw            or            outer * tanh(inner * raw)            raw = hidden @ weight.T + bias

(scale, softcap, dtype casts), row slices and reshapes act on hidden, a vocabulary slice on the weight. Consumers that
need a few floats a token (`F.cross_entropy`, `nll_loss` and `gather` of `log_softmax`, `logsumexp`, `argmax`) are
answered by `hf_xent.ops`. Any other operation makes the dense tensor, once, with autograd: always correct, only not lean.

The wrapper has a grad_fn of its own, so consumers below Python (custom autograd functions, hooks of wrappers) see a
value through `__torch_dispatch__` and their gradients still reach hidden and the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from .losses import CrossEntropy
from .ops import Head, Stats, vocab_stats


@dataclass
class Seam:
    """What the lazy logits of one model share: options on the way down, counts and token sums on the way up."""

    observe: tuple[str, ...] = ()  # statistics to collect beside the loss
    options: dict[str, Any] = field(default_factory=dict)  # impl, memory_budget
    streamed: int = 0  # consumers answered without logits
    materialized: int = 0  # dense tensors made
    training: bool = True  # the model's mode in its last forward
    sums: dict[bool, dict[str, Tensor]] = field(default_factory=dict)  # by mode, over tokens since the last `take`

    def record(self, stats: Stats) -> None:
        """Count a streamed consumer, and add its tokens to the sums if anything is observed."""
        self.streamed += 1
        if not self.observe:
            return
        found = {"tokens": stats.mask.sum(), "nll": stats.nll.sum()}
        if "entropy" in stats.values:
            found["entropy"] = stats.entropy.sum()
        if "top" in stats.values:
            found["correct"] = stats.is_top1.sum()
        before = self.sums.get(self.training, {})
        self.sums[self.training] = {name: value + before.get(name, 0) for name, value in found.items()}

    def take(self, *, training: bool = True) -> dict[str, Tensor]:
        """The sums over tokens seen in that mode since the last call: tokens, nll, entropy, correct."""
        return self.sums.pop(training, {})


@dataclass(frozen=True, eq=False)
class _Recipe:
    """How a lazy tensor's value comes from the head's operands."""

    inner: float = 1.0
    outer: float | None = None  # None: no tanh
    log_probs: bool = False  # log_softmax on top

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        if self.outer is None:
            return Head(weight, bias, scale=self.inner)
        return Head(weight, bias, scale=self.inner * self.outer, softcap=self.outer)

    def times(self, factor: float) -> _Recipe:
        if self.outer is None:
            return replace(self, inner=self.inner * factor)
        return replace(self, outer=self.outer * factor)


class LazyLogits(torch.Tensor):
    """A head's output [..., V] that has not been multiplied; see the module's docstring. Made by a patched head."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    recipe: _Recipe
    seam: Seam
    parent: tuple[LazyLogits, Callable[[Tensor], Tensor]] | None  # what this is a view of, and how
    made: Tensor | None  # the dense tensor, once something needed it

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, seam: Seam | None = None) -> LazyLogits:
        """The lazy twin of `F.linear(hidden, weight, bias)`."""
        return _lazy(hidden, weight, bias, _Recipe(), hidden.dtype, seam or Seam())

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
            with torch.set_grad_enabled(self.requires_grad), torch.autocast(self.hidden.device.type, enabled=False):
                self.made = self._value(self.hidden, self.weight, self.bias)
        return self.made

    def _value(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = self.recipe.head(weight, bias).logits(hidden)
        return (z.log_softmax(-1) if self.recipe.log_probs else z).to(self.dtype)

    def stats(self, labels: Tensor, *, shift: bool = False, outputs: tuple[str, ...] | None = None) -> Stats:
        """Every token's statistics, differentiable, in the shape of labels; see `hf_xent.vocab_stats`.

        `labels` are aligned with the logits, as for F.cross_entropy; with `shift=True` they are the model's own labels
        [B, T], and position t is scored against t + 1 (the last one is ignored).
        """
        if shift:
            labels = next_token_labels(labels)
        asked = {} if outputs is None else {"outputs": outputs}
        return vocab_stats(self.hidden, self.head, labels, **asked, **self.seam.options)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        state = "dense" if self.is_dense else "not computed"
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, {state})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ANSWERS and isinstance(args[0] if args else None, LazyLogits) and not args[0].is_dense:
            answer = _ANSWERS[func](*args, **kwargs)
            if answer is not NotImplemented:
                return answer
        elif func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*_densify(args), **_densify(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # below autograd: whoever comes here differentiates with respect to the wrapper, and _Lazy.backward takes over
        def value(x: Any) -> Any:
            return x.dense().detach() if isinstance(x, LazyLogits) else x

        return func(*tree_map(value, args), **tree_map(value, kwargs or {}))


def next_token_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Labels [B, T] moved one to the left: what position t has to predict; the last position is ignored."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()


class _Lazy(torch.autograd.Function):
    """Gives the wrapper a place in the graph; its backward serves consumers that took dense values below Python."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, recipe: _Recipe, dtype: Any, seam: Seam
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
        return (*(next(grads) if t is not None and t.requires_grad else None for t in leaves), None, None, None)


def _lazy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recipe: _Recipe,
    dtype: torch.dtype,
    seam: Seam,
    parent: Any = None,
) -> LazyLogits:
    lazy = _Lazy.apply(hidden, weight, bias, recipe, dtype, seam)
    lazy.hidden, lazy.weight, lazy.bias, lazy.parent = hidden, weight, bias, parent
    return lazy


def _densify(tree: Any) -> Any:
    return tree_map(lambda x: x.dense() if isinstance(x, LazyLogits) else x, tree)


# --- what keeps a lazy tensor lazy -----------------------------------------------------------------------------------


def _with(x: LazyLogits, **changes: Any) -> LazyLogits:
    """A lazy tensor that differs in some operands."""
    now = {"hidden": x.hidden, "weight": x.weight, "bias": x.bias, "recipe": x.recipe, "dtype": x.dtype, "seam": x.seam}
    return _lazy(**{**now, **changes})


def _cast(x: LazyLogits, dtype: torch.dtype) -> LazyLogits:
    return x if dtype == x.dtype else _with(x, dtype=dtype)


def _to(x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    """`.to(dtype)`, `.to(device)` of the same device, `.to(other)`."""
    device, dtype, _, memory_format = torch._C._nn._parse_to(
        *(_meta(a) for a in args), **{k: _meta(v) for k, v in kwargs.items()}
    )
    if memory_format is not None or (device is not None and device != x.device):
        return NotImplemented
    return x if dtype is None else _cast(x, dtype)


def _meta(x: Any) -> Any:
    return torch.empty(0, dtype=x.dtype, device=x.device) if isinstance(x, LazyLogits) else x


def _same(x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    return (
        NotImplemented
        if kwargs.get("memory_format") not in (None, torch.preserve_format, torch.contiguous_format)
        else x
    )


def _detach(x: LazyLogits) -> LazyLogits:
    bias = None if x.bias is None else x.bias.detach()
    return _with(x, hidden=x.hidden.detach(), weight=x.weight.detach(), bias=bias)


def _times(x: LazyLogits, factor: Any, **kwargs: Any) -> Any:
    number = _number(factor)
    if kwargs or number is None or x.recipe.log_probs or not x.is_floating_point():
        return NotImplemented
    return _with(x, recipe=x.recipe.times(number))


def _divided(x: LazyLogits, divisor: Any, **kwargs: Any) -> Any:
    number = _number(divisor)
    return NotImplemented if not number else _times(x, 1 / number, **kwargs)


def _number(x: Any) -> float | None:
    """A Python number, or a constant scalar tensor's value; None for anything that varies or learns."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    if isinstance(x, Tensor) and x.ndim == 0 and not x.requires_grad and x.device.type == "cpu":
        return float(x)
    return None


def _tanh(x: LazyLogits) -> Any:
    if x.recipe.outer is not None or x.recipe.log_probs:
        return NotImplemented
    return _with(x, recipe=replace(x.recipe, outer=1.0))


def _reshape(x: LazyLogits, *shape: Any) -> Any:
    sizes = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
    if not all(isinstance(n, int) for n in sizes) or not sizes:  # .view(dtype)
        return NotImplemented
    if -1 in sizes:
        sizes[sizes.index(-1)] = x.numel() // -_product(sizes) if _product(sizes) else 0
    if sizes[-1] != x.shape[-1] or _product(sizes) != x.numel():
        return NotImplemented
    return _rows(x, lambda h: h.reshape(*sizes[:-1], h.shape[-1]), lambda d: d.reshape(sizes))


def _product(sizes: Any) -> int:
    total = 1
    for n in sizes:
        total *= n
    return total


def _rows(x: LazyLogits, on_hidden: Callable[[Tensor], Tensor], on_dense: Callable[[Tensor], Tensor]) -> LazyLogits:
    return _with(x, hidden=on_hidden(x.hidden), parent=(x, on_dense))


def _view_as(x: LazyLogits, other: Tensor) -> Any:
    return _reshape(x, *other.shape)


def _flatten(x: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = start_dim % x.ndim, end_dim % x.ndim
    if end == x.ndim - 1:
        return NotImplemented
    return _reshape(x, *x.shape[:start], -1, *x.shape[end + 1 :])


def _unsqueeze(x: LazyLogits, dim: int) -> Any:
    place = dim % (x.ndim + 1)
    return NotImplemented if place == x.ndim else _rows(x, lambda h: h.unsqueeze(place), lambda d: d.unsqueeze(place))


def _squeeze(x: LazyLogits, *dims: Any) -> Any:
    if len(dims) != 1 or not isinstance(dims[0], int) or dims[0] % x.ndim == x.ndim - 1:
        return NotImplemented
    return _rows(x, lambda h: h.squeeze(dims[0] % x.ndim), lambda d: d.squeeze(dims[0] % x.ndim))


def _getitem(x: LazyLogits, index: Any) -> Any:
    """Rows by slices, integers, masks or index tensors; a slice of the vocabulary in the last place."""
    index = index if isinstance(index, tuple) else (index,)
    used = sum(
        i.ndim if isinstance(i, Tensor) and i.dtype == torch.bool else 1
        for i in index
        if i is not None and i is not ...
    )
    counted_from_the_end = any(i is ... for i in index) and index[-1] is not ...
    vocabulary = slice(None)
    if counted_from_the_end or used >= x.ndim:
        if used > x.ndim or not isinstance(index[-1], slice):
            return NotImplemented
        index, vocabulary = (*index[:-1], slice(None)), index[-1]
    untouched = all(i is ... or i == slice(None) if not isinstance(i, Tensor) else False for i in index)
    return _vocabulary(x if untouched else _rows(x, lambda h: h[index], lambda d: d[index]), vocabulary)


def _vocabulary(x: LazyLogits, part: slice) -> Any:
    if part == slice(None) or range(*part.indices(x.shape[-1])) == range(x.shape[-1]):
        return x
    if x.recipe.log_probs:
        return NotImplemented
    bias = None if x.bias is None else x.bias[part]
    return _with(x, weight=x.weight[part], bias=bias, parent=(x, lambda d: d[..., part]))


# --- what answers without logits -------------------------------------------------------------------------------------


def _cross_entropy(
    x: LazyLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """`F.cross_entropy` of [N, V] and class indices; 0 (not NaN) where every label is ignored, for DDP's sake."""
    indices = (
        isinstance(target, Tensor) and not target.is_floating_point() and x.ndim == 2 and target.shape == x.shape[:1]
    )
    if not indices or size_average is not None or reduce is not None or (weight is not None and label_smoothing):
        return NotImplemented
    token_weight = None if weight is None else weight[torch.where(target == ignore_index, 0, target)]
    loss, stats = CrossEntropy(label_smoothing=label_smoothing).compute(
        x.hidden, x.head, target, reduction=reduction, token_weight=token_weight, ignore_index=ignore_index,
        observe=x.seam.observe, **x.seam.options,
    )  # fmt: skip
    x.seam.record(stats)
    return loss.to(x.dtype)


def _nll_loss(x: LazyLogits, target: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`F.nll_loss` of log-probabilities is the cross-entropy of their logits (its arguments come in the same order)."""
    return _cross_entropy(x, target, *args, **kwargs) if x.recipe.log_probs else NotImplemented


def _log_softmax(x: LazyLogits, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    if dim is None or dim % x.ndim != x.ndim - 1 or x.recipe.log_probs:
        return NotImplemented
    return _with(x, recipe=replace(x.recipe, log_probs=True), dtype=dtype or x.dtype)


def _gather(x: LazyLogits, dim: int, index: Tensor, **kwargs: Any) -> Any:
    """One column a row: the label's logit, or its log-probability."""
    if kwargs or dim % x.ndim != x.ndim - 1 or index.shape != (*x.shape[:-1], 1):
        return NotImplemented
    stats = _scalar_stats(x, index.squeeze(-1), ("lse", "target"))
    return (stats.logp if x.recipe.log_probs else stats.target).unsqueeze(-1).to(x.dtype)


def _logsumexp(x: LazyLogits, dim: Any, keepdim: bool = False) -> Any:
    if not isinstance(dim, int) or dim % x.ndim != x.ndim - 1 or x.recipe.log_probs:
        return NotImplemented
    lse = _scalar_stats(x, None, ("lse",)).lse.to(x.dtype)
    return lse.unsqueeze(-1) if keepdim else lse


def _argmax(x: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
    if not isinstance(dim, int) or dim % x.ndim != x.ndim - 1:
        return NotImplemented
    top = _scalar_stats(_detach(x), None, ("top",)).top
    return top.unsqueeze(-1) if keepdim else top


def _scalar_stats(x: LazyLogits, labels: Tensor | None, outputs: tuple[str, ...]) -> Stats:
    if labels is None:
        labels = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    x.seam.streamed += 1
    return vocab_stats(x.hidden, x.head, labels, outputs=outputs, ignore_index=-(2**31), **x.seam.options)


_T = torch.Tensor
_ANSWERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((_T.contiguous, _T.clone, torch.clone), _same),
    **dict.fromkeys((_T.detach, torch.detach), _detach),
    **dict.fromkeys((_T.mul, _T.__mul__, _T.__rmul__, torch.mul, torch.multiply), _times),
    **dict.fromkeys((_T.div, _T.__truediv__, torch.div, torch.true_divide), _divided),
    **dict.fromkeys((_T.tanh, torch.tanh), _tanh),
    **dict.fromkeys((_T.view, _T.reshape, torch.reshape), _reshape),
    **dict.fromkeys((_T.flatten, torch.flatten), _flatten),
    **dict.fromkeys((_T.unsqueeze, torch.unsqueeze), _unsqueeze),
    **dict.fromkeys((_T.squeeze, torch.squeeze), _squeeze),
    **dict.fromkeys((_T.log_softmax, torch.log_softmax, F.log_softmax), _log_softmax),
    **dict.fromkeys((_T.gather, torch.gather), _gather),
    **dict.fromkeys((_T.logsumexp, torch.logsumexp), _logsumexp),
    **dict.fromkeys((_T.argmax, torch.argmax), _argmax),
    _T.float: lambda x: _cast(x, torch.float32),
    _T.double: lambda x: _cast(x, torch.float64),
    _T.half: lambda x: _cast(x, torch.float16),
    _T.bfloat16: lambda x: _cast(x, torch.bfloat16),
    _T.to: _to,
    _T.view_as: _view_as,
    _T.__getitem__: _getitem,
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll_loss,
}
_METADATA = {
    *torch.overrides.get_default_nowrap_functions(),
    *(
        getattr(_T, name).__get__
        for name in ("shape", "dtype", "device", "requires_grad", "grad_fn", "is_leaf", "layout", "ndim")
    ),
    *(
        getattr(_T, name).__get__
        for name in ("is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_meta", "is_nested", "_version")
    ),
    *(
        _T.size,
        _T.dim,
        _T.ndimension,
        _T.numel,
        _T.nelement,
        _T.is_floating_point,
        _T.is_complex,
        _T.__len__,
        _T.get_device,
    ),
    *(
        _T.register_hook,
        _T.retain_grad,
        _T._backward_hooks.__get__,
        _T._backward_hooks.__set__,
        torch.is_floating_point,
    ),
    *(_T.stride, _T.is_contiguous, _T.element_size, _T.storage_offset, torch.numel, torch.is_complex),
}
