"""The check of a patch: a model runs stock and patched on the same tokens, and loss and gradients are compared, twice.

How far two correct runs differ by rounding depends on the CPU and the dtype, so no fixed tolerance is right for all:

    exactly    with the head and all that follows it (scale, softcap, loss) in float64. The layers below do the same
               operations on the same numbers in both runs, in whatever dtype, so that nothing may differ but the
               rounding of float64: a loss or a gradient with an error above EXACT is wrong.
    as it is   in the model's own dtype, by the kernels that training will use. Its noise is how far the stock model is
               from its own exact run, in the loss or any gradient, whichever is farther: the effect of rounding logits,
               softmax and their gradients. The patched model may be FACTOR times as far from the stock one: they round
               independently (sqrt(2)), and the noise of a gradient of few numbers may be small by chance in one run.

Where float64 is not available (a head that is sharded, offloaded, or on a device without it), or is the model's own
dtype, so that its exact run shows no noise, the second has the tolerances ASSUMED. A gradient's error is relative to
its norm, but at least to a thousandth of the norm of all gradients together: some are zero except for rounding (key
biases).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager as Context
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..lazy import LazyLogits, PatchState
from ..models.contexts import eval_mode
from .float64 import in_float64, supports_float64
from .heads import inner_of, layers_of
from .output_layer import output_layer_of

EXACT = 1e-6  # float64 leaves 1e-13 in the hidden states' gradient; the layers below may amplify it
FACTOR = 8.0
ASSUMED = {2: 1e-1, 4: 1e-3, 8: 1e-6}  # tolerances by the bytes of a number
_FLOOR = 1e-3  # of the norm of all gradients together
_TINY = 1e-30


@dataclass(frozen=True)
class Comparison:
    """A model that ran stock and patched on the same tokens: its head, and how far loss and gradients differ.

    Attributes:
        model: The class of the model.
        head: The name of its head among its modules.
        vocabulary: V, the rows of the head's weight.
        hidden: D, its columns.
        bias: Whether the head has a bias.
        tied: Whether its weight is that of the input embeddings.
        scale: The factor of the logits after the head; NaN if they were not lazy.
        softcap: Their softcap, or None.
        dtype: The dtype of the head's weight.
        loss: The stock model's loss, nats.
        loss_error: The relative distance of the patched model's loss from it.
        gradient_error: The largest distance between a parameter's gradients, relative to the gradient's norm.
        worst: The name of that parameter.
        noise: How far the stock model is from its own exact run, the larger of the same two errors; None where
            float64 is not available.
        tolerance: The largest `loss_error` and `gradient_error` that are accepted.
        exact_loss_error: As `loss_error`, with all that follows the hidden states in float64, or None.
        exact_gradient_error: As `gradient_error`, in the same runs, or None.
        exact_tolerance: The largest values of these two that are accepted.
        streamed: How many losses and other results were computed without logits.
        materialized: How many dense tensors of logits were computed.
        bypassed: How many calls computed their logits at once.
        reason: Why the last of them did so.
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
        """Whether the loss was computed without logits: streamed, never materialized nor bypassed."""
        return self.streamed > 0 and self.materialized == self.bypassed == 0

    @property
    def way(self) -> str:
        """How the patched model computed its loss, in words."""
        if self.lean:
            return "without materializing logits"
        if self.materialized:
            return f"but logits were materialized {self.materialized} times"
        result = "logits were computed as well" if self.streamed else "nothing was streamed"
        return f"but {result}: {self.reason or 'the head was never called'}"

    def as_dict(self) -> dict[str, Any]:
        """The fields and the verdicts, for JSON."""
        return {**asdict(self), "equal": self.equal, "lean": self.lean}


def run_both_ways(
    model: nn.Module,
    stock: Callable[[], Context[nn.Module]],
    patched: Callable[[], Context[PatchState]],
    batch: int | Mapping[str, Any],
) -> Comparison:
    """Compare a model in the context `stock` with itself in `patched`, on a batch or so many random tokens."""
    inner: Any = inner_of(model)
    head = layers_of(inner)[0]
    dtype = head.weight.dtype if head.weight.is_floating_point() else inner.get_input_embeddings().weight.dtype
    with eval_mode(inner):
        runner = _Runner(model, _tokens(inner, head, batch) if isinstance(batch, int) else dict(batch))
        truth, exact, exact_tolerance = runner.run_in_float64(inner, stock, patched)
        with stock():
            expected = runner()
        noise = None if truth is None else max(_Errors.of(expected, truth).largest, torch.finfo(dtype).eps)
        del truth
        with patched() as state:
            result = runner()
    errors = _Errors.of(result, expected)
    lazy = result.logits if isinstance(result.logits, LazyLogits) else None
    lazy_head = None if lazy is None else lazy.recipe.head(lazy.raw)
    embeddings = inner.get_input_embeddings()
    return Comparison(
        model=type(inner).__name__,
        head=next((name for name, m in inner.named_modules() if m is head), "?"),
        vocabulary=head.out_features,
        hidden=head.in_features,
        bias=head.bias is not None,
        tied=embeddings is not None and getattr(embeddings, "weight", None) is head.weight,
        scale=float("nan") if lazy_head is None else lazy_head.scale,
        softcap=None if lazy_head is None else lazy_head.softcap,
        dtype=str(dtype).removeprefix("torch."),
        loss=float(expected.loss),
        loss_error=errors.loss,
        gradient_error=errors.gradients.get(errors.worst, 0.0),
        worst=errors.worst,
        noise=noise,
        tolerance=ASSUMED[dtype.itemsize] if noise is None or dtype == torch.float64 else FACTOR * noise,
        exact_loss_error=None if exact is None else exact.loss,
        exact_gradient_error=None if exact is None else exact.gradients.get(exact.worst, 0.0),
        exact_tolerance=exact_tolerance,
        streamed=state.streamed,
        materialized=state.materialized,
        bypassed=state.bypassed,
        reason=state.reason,
    )


@dataclass(frozen=True)
class _Result:
    """Loss, gradients and logits of one run."""

    loss: Tensor
    gradients: dict[str, Tensor]
    logits: Any


class _Runner:
    """Runs a model on a batch, with the same random numbers each time."""

    def __init__(self, model: nn.Module, batch: dict[str, Any]):
        self.model, self.batch = model, batch
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def __call__(self) -> _Result:
        devices = {x.device for x in self.batch.values() if isinstance(x, Tensor) and x.is_cuda}
        with torch.enable_grad(), torch.random.fork_rng(list(devices)):
            torch.manual_seed(0)
            out = self.model(**self.batch)
            parameters = list(self.parameters.values())
            grads = torch.autograd.grad(out.loss, parameters, allow_unused=True) if parameters else ()
        gradients = {name: g for name, g in zip(self.parameters, grads, strict=True) if g is not None}
        return _Result(out.loss.detach(), gradients, out.logits)

    def run_in_float64(
        self, inner: Any, stock: Callable[[], Context[nn.Module]], patched: Callable[[], Context[PatchState]]
    ) -> tuple[_Result | None, _Errors | None, float]:
        """The stock model's exact run, the patched model's errors against it, and the tolerance for them."""
        layer: Any = output_layer_of(inner)
        if not all(supports_float64(module) for module in layer.modules()):
            return None, None, EXACT
        try:
            with stock(), in_float64(layer):
                truth = self()
        except Exception:  # an adapter on the head, or what follows it, requires the model's dtype
            return None, None, EXACT
        with patched(), in_float64(layer):
            errors = _Errors.of(self(), truth)
        if errors.largest <= EXACT:
            return truth, errors, EXACT
        with stock(), in_float64(layer):  # a GPU may add in any order: the model's distance from itself
            repeated = _Errors.of(self(), truth)
        return truth, errors, max(EXACT, FACTOR * repeated.largest)


@dataclass(frozen=True)
class _Errors:
    """The relative distances of one run from another."""

    loss: float
    gradients: dict[str, float]

    @classmethod
    def of(cls, result: _Result, expected: _Result) -> _Errors:
        """The errors of `result` against `expected`; infinite for a gradient that only one of them has."""
        norms = {name: float(g.double().norm()) for name, g in expected.gradients.items()}
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        gradients = result.gradients
        distances = {
            name: float((gradients[name].double() - g.double()).norm()) if name in gradients else math.inf
            for name, g in expected.gradients.items()
        }
        distances |= dict.fromkeys(gradients.keys() - expected.gradients.keys(), math.inf)
        loss, expected_loss = float(result.loss), float(expected.loss)
        return cls(
            abs(loss - expected_loss) / max(abs(expected_loss), _TINY),
            {name: x / max(norms.get(name, 0.0), _FLOOR * total, _TINY) for name, x in distances.items()},
        )

    @property
    def worst(self) -> str:
        """The parameter whose gradient is farthest; NaN is farther than anything."""
        return max(self.gradients, key=lambda name: _nan_as_inf(self.gradients[name]), default="")

    @property
    def largest(self) -> float:
        """The largest error of the loss and the gradients."""
        return max(map(_nan_as_inf, (self.loss, *self.gradients.values())))


def _nan_as_inf(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _tokens(inner: nn.Module, head: nn.Linear, count: int) -> dict[str, Any]:
    name = getattr(inner, "main_input_name", "input_ids")
    if name != "input_ids":
        raise ValueError(
            f"model is a {type(inner).__name__}, which takes {name}, and not tokens alone: pass batch={{{name!r}: ...,"
            " 'labels': ...}"
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(head.out_features, 2**15), (2, count // 2), generator=generator)
    ids = ids.to(next((x.device for x in (head.weight, *inner.parameters()) if not x.is_meta), ids.device))
    return {"input_ids": ids, "labels": ids}
