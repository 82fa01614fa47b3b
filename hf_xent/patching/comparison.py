"""The proof of a patch: a model run stock and patched on the same tokens, loss and every gradient compared, twice.

How far rounding takes two sound runs apart depends on the CPU and the dtype, so no fixed number can judge it:

    exactly    with the head and all that follows it (scale, softcap, loss) in float64. The layers below do the same
               operations on the same numbers in both runs, in whatever dtype, so nothing is left that may differ but
               float64's own rounding: a loss or a gradient that is off by more than EXACT is wrong.
    as it is   in the model's own dtype, by the kernels that training will use. Its noise is how far the stock model is
               from its own exact run, in the loss or any gradient, whichever is farther: what rounding logits, softmax
               and their gradients does. The patched model may be FACTOR times as far from the stock one: they round
               independently (sqrt(2)), and of a gradient of few numbers the noise seen once may be a small one.

Where float64 cannot be had (a head that is sharded, offloaded, or on a device without it) the second is judged by
ASSUMED. A gradient's error is relative to its norm, but at least to a thousandth of the whole gradient's: some are zero
but for rounding (key biases).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager as Context
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..lazy import LazyLogits, PatchState
from ..models.contexts import eval_mode
from .float64 import in_float64, is_plain
from .heads import inner_of, linears_of

EXACT = 1e-6  # float64 leaves 1e-13 in the hidden states' gradient; the layers below may amplify it
FACTOR = 8.0
ASSUMED = {2: 1e-1, 4: 1e-3, 8: 1e-6}  # tolerances by the bytes of a number
_FLOOR = 1e-3  # of the whole gradient's norm
_TINY = 1e-30


@dataclass(frozen=True)
class Comparison:
    """A model run both ways on the same tokens: what its head is, and how far loss and gradients differ.

    Attributes:
        model: The class of the model.
        head: The name of its head among its modules.
        vocabulary: V, the rows of the head's weight.
        hidden: D, its columns.
        bias: Whether the head has a bias.
        tied: Whether its weight is that of the input embeddings.
        scale: What the logits are multiplied with after the head; NaN if they were not lazy.
        softcap: Their softcap, or None.
        dtype: The dtype of the head's weight.
        loss: The stock model's loss, nats.
        loss_error: How far the patched model's is from it, relatively.
        gradient_error: The largest distance of a parameter's gradients, relative to the gradient's norm.
        worst: The name of that parameter.
        noise: How far the stock model is from its own exact run, the larger of the same two; None where float64 cannot
            be had.
        tolerance: What `loss_error` and `gradient_error` may be.
        exact_loss_error: As `loss_error`, with all that follows the hidden states in float64, or None.
        exact_gradient_error: As `gradient_error`, in the same runs, or None.
        exact_tolerance: What these two may be.
        streamed: How many consumers of logits were answered without them.
        materialized: How often logits were made after all.
        bypassed: How often the head made its logits at once.
        reason: Why it did so.
    """

    model: str
    head: str
    vocabulary: int
    hidden: int
    bias: bool
    tied: bool
    scale: float
    softcap: float | None
    dtype: str
    loss: float
    loss_error: float
    gradient_error: float
    worst: str
    noise: float | None
    tolerance: float
    exact_loss_error: float | None
    exact_gradient_error: float | None
    exact_tolerance: float
    streamed: int
    materialized: int
    bypassed: int
    reason: str

    @property
    def equal(self) -> bool:
        """Whether loss and every gradient agree: exactly, and in the model's dtype as far as its noise allows."""
        in_its_dtype = (error <= self.tolerance for error in (self.loss_error, self.gradient_error))
        exact = (self.exact_loss_error, self.exact_gradient_error)
        return all(in_its_dtype) and all(error is None or error <= self.exact_tolerance for error in exact)

    @property
    def lean(self) -> bool:
        """Whether the loss was taken without logits: streamed, never materialized nor made at once."""
        return self.streamed > 0 and self.materialized == self.bypassed == 0

    @property
    def way(self) -> str:
        """How the patched model came to its loss, in words."""
        if self.lean:
            return "without materializing logits"
        if self.materialized:
            return f"but logits were materialized {self.materialized} times"
        result = "logits were made as well" if self.streamed else "nothing was streamed"
        return f"but {result}: {self.reason or 'the head was never called'}"

    def as_dict(self) -> dict[str, Any]:
        """The fields and the verdicts, for JSON."""
        return {**asdict(self), "equal": self.equal, "lean": self.lean}


def run_both_ways(
    model: nn.Module, stock: Callable[[], Context[nn.Module]], patched: Callable[[], Context[PatchState]], tokens: int
) -> Comparison:
    """Compare a model in one context with itself in another; leaves it as it was."""
    inner: Any = inner_of(model)
    head = linears_of(inner)[0]
    dtype = head.weight.dtype
    with eval_mode(inner):
        run = _Runs(model, _tokens(head.weight, tokens))
        truth, exact, exact_tolerance = run.exactly(inner, stock, patched)
        with stock():
            expected = run()
        noise = None if truth is None else max(_Errors.of(expected, truth).largest, torch.finfo(dtype).eps)
        del truth
        with patched() as state:
            answer = run()
    errors = _Errors.of(answer, expected)
    head_seen = answer.logits.head if isinstance(answer.logits, LazyLogits) else None
    embeddings = inner.get_input_embeddings()
    return Comparison(
        model=type(inner).__name__,
        head=next((name for name, m in inner.named_modules() if m is head), "?"),
        vocabulary=head.weight.shape[0],
        hidden=head.weight.shape[1],
        bias=head.bias is not None,
        tied=embeddings is not None and getattr(embeddings, "weight", None) is head.weight,
        scale=float("nan") if head_seen is None else head_seen.scale,
        softcap=None if head_seen is None else head_seen.softcap,
        dtype=str(dtype).removeprefix("torch."),
        loss=float(expected.loss),
        loss_error=errors.loss,
        gradient_error=errors.gradients.get(errors.worst, 0.0),
        worst=errors.worst,
        noise=noise,
        tolerance=ASSUMED[dtype.itemsize] if noise is None else FACTOR * noise,
        exact_loss_error=None if exact is None else exact.loss,
        exact_gradient_error=None if exact is None else exact.gradients.get(exact.worst, 0.0),
        exact_tolerance=exact_tolerance,
        streamed=state.streamed,
        materialized=state.materialized,
        bypassed=state.bypassed,
        reason=state.reason,
    )


@dataclass(frozen=True)
class _Answer:
    """Of one run."""

    loss: Tensor
    gradients: dict[str, Tensor]
    logits: Any


class _Runs:
    """A model on tokens, with the same random numbers each time."""

    def __init__(self, model: nn.Module, ids: Tensor):
        self.model, self.ids = model, ids
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def __call__(self) -> _Answer:
        devices = [self.ids.device] if self.ids.is_cuda else []
        with torch.enable_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            out = self.model(input_ids=self.ids, labels=self.ids)
            wanted = list(self.parameters.values())
            grads = torch.autograd.grad(out.loss, wanted, allow_unused=True) if wanted else ()
        gradients = {name: g for name, g in zip(self.parameters, grads, strict=True) if g is not None}
        return _Answer(out.loss.detach(), gradients, out.logits)

    def exactly(
        self, inner: Any, stock: Callable[[], Context[nn.Module]], patched: Callable[[], Context[PatchState]]
    ) -> tuple[_Answer | None, _Errors | None, float]:
        """The stock model's exact run, how far the patched one's is from it, and how far it may be."""
        layer = inner.get_output_embeddings()
        if not all(is_plain(module) for module in layer.modules()):
            return None, None, EXACT
        try:
            with stock(), in_float64(layer):
                truth = self()
        except Exception:  # an adapter on the head, or what follows it, insists on the model's dtype
            return None, None, EXACT
        with patched(), in_float64(layer):
            errors = _Errors.of(self(), truth)
        if errors.largest <= EXACT:
            return truth, errors, EXACT
        with stock(), in_float64(layer):  # a GPU may add in any order: how far the model is from itself
            again = _Errors.of(self(), truth)
        return truth, errors, max(EXACT, FACTOR * again.largest)


@dataclass(frozen=True)
class _Errors:
    """How far one run is from another, relatively."""

    loss: float
    gradients: dict[str, float]

    @classmethod
    def of(cls, answer: _Answer, expected: _Answer) -> _Errors:
        """Of the first from the second; a gradient that one of them lacks is infinitely far."""
        norms = {name: float(g.double().norm()) for name, g in expected.gradients.items()}
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        gradients = answer.gradients
        distances = {
            name: float((gradients[name].double() - g.double()).norm()) if name in gradients else math.inf
            for name, g in expected.gradients.items()
        }
        distances |= dict.fromkeys(gradients.keys() - expected.gradients.keys(), math.inf)
        loss, right = float(answer.loss), float(expected.loss)
        return cls(
            abs(loss - right) / max(abs(right), _TINY),
            {name: x / max(norms.get(name, 0.0), _FLOOR * total, _TINY) for name, x in distances.items()},
        )

    @property
    def worst(self) -> str:
        """The parameter whose gradient is farthest; NaN is farther than anything."""
        return max(self.gradients, key=lambda name: _ordered(self.gradients[name]), default="")

    @property
    def largest(self) -> float:
        """Of the loss and any gradient."""
        return max(map(_ordered, (self.loss, *self.gradients.values())))


def _ordered(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _tokens(weight: Tensor, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(weight.shape[0], 2**15), (2, count // 2), generator=generator).to(weight.device)
