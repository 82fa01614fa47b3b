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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager as Context
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..lazy import LazyLogits, PatchState
from ..models.contexts import eval_mode
from .heads import fleeting, inner_of, is_split, linears_of

EXACT = 1e-6  # float64 leaves 1e-13 in the hidden states' gradient; the layers below may amplify it
FACTOR = 8.0
ASSUMED = {2: 1e-1, 4: 1e-3, 8: 1e-6}  # tolerances by the bytes of a number
_FLOOR = 1e-3  # of the whole gradient's norm
_TINY = 1e-30
_NARROWING = (Tensor.float, Tensor.half, Tensor.bfloat16)
_CASTS = (Tensor.to, Tensor.type, Tensor.type_as)


@dataclass(frozen=True)
class Comparison:
    """A model run both ways on the same tokens: what its head is, and how far loss and gradients differ."""

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
    loss_error: float  # relative
    gradient_error: float  # largest over parameters, relative to the parameter's gradient norm
    worst: str  # the parameter that has it
    noise: float | None  # the stock model's own, the larger of the same two; None where float64 cannot be had
    tolerance: float  # FACTOR times that
    exact_loss_error: float | None  # with all that follows the hidden states in float64
    exact_gradient_error: float | None  # largest over parameters
    exact_tolerance: float
    streamed: int
    materialized: int
    bypassed: int
    reason: str  # why the head made its logits at once, if it did

    @property
    def equal(self) -> bool:
        """Whether loss and every gradient agree: exactly, and in the model's dtype as far as its noise allows."""
        own = (error <= self.tolerance for error in (self.loss_error, self.gradient_error))
        exact = (self.exact_loss_error, self.exact_gradient_error)
        return all(own) and all(error is None or error <= self.exact_tolerance for error in exact)

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
        done = "logits were made as well" if self.streamed else "nothing was streamed"
        return f"but {done}: {self.reason or 'the head was never called'}"

    def as_dict(self) -> dict[str, Any]:
        """The fields and the verdicts, for JSON."""
        return {**asdict(self), "equal": self.equal, "lean": self.lean}


def run_both_ways(
    model: nn.Module, stock: Callable[[], Context[Any]], patched: Callable[[], Context[PatchState]], tokens: int
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
            ours = run()
    errors = _Errors.of(ours, expected)
    recipe = ours.logits.head if isinstance(ours.logits, LazyLogits) else None
    embeddings = inner.get_input_embeddings()
    return Comparison(
        model=type(inner).__name__,
        head=next((name for name, m in inner.named_modules() if m is head), "?"),
        vocabulary=head.weight.shape[0],
        hidden=head.weight.shape[1],
        bias=head.bias is not None,
        tied=embeddings is not None and getattr(embeddings, "weight", None) is head.weight,
        scale=float("nan") if recipe is None else recipe.scale,
        softcap=None if recipe is None else recipe.softcap,
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
            found = torch.autograd.grad(out.loss, wanted, allow_unused=True) if wanted else ()
        gradients = {name: g for name, g in zip(self.parameters, found, strict=True) if g is not None}
        return _Answer(out.loss.detach(), gradients, out.logits)

    def exactly(
        self, inner: Any, stock: Callable[[], Context[Any]], patched: Callable[[], Context[PatchState]]
    ) -> tuple[_Answer | None, _Errors | None, float]:
        """The stock model's exact run, how far the patched one's is from it, and how far it may be."""
        layer = inner.get_output_embeddings()
        if not all(_is_plain(module) for module in layer.modules()):
            return None, None, EXACT
        try:
            with stock(), _in_float64(layer):
                truth = self()
        except Exception:  # an adapter on the head, or what follows it, insists on the model's dtype
            return None, None, EXACT
        with patched(), _in_float64(layer):
            errors = _Errors.of(self(), truth)
        if errors.largest <= EXACT:
            return truth, errors, EXACT
        with stock(), _in_float64(layer):  # a GPU may add in any order: how far the model is from itself
            again = _Errors.of(self(), truth)
        return truth, errors, max(EXACT, FACTOR * again.largest)


@dataclass(frozen=True)
class _Errors:
    """How far one run is from another, relatively."""

    loss: float
    gradients: dict[str, float]

    @classmethod
    def of(cls, ours: _Answer, expected: _Answer) -> _Errors:
        """Of the first from the second; a gradient that one of them lacks is infinitely far."""
        norms = {name: float(g.double().norm()) for name, g in expected.gradients.items()}
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        apart = {
            name: float((ours.gradients[name].double() - g.double()).norm()) if name in ours.gradients else math.inf
            for name, g in expected.gradients.items()
        }
        apart |= dict.fromkeys(ours.gradients.keys() - expected.gradients.keys(), math.inf)
        loss, right = float(ours.loss), float(expected.loss)
        return cls(
            abs(loss - right) / max(abs(right), _TINY),
            {name: x / max(norms.get(name, 0.0), _FLOOR * total, _TINY) for name, x in apart.items()},
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


def _is_plain(module: Any) -> bool:
    """Whether a layer's numbers can be had in float64 for a while: they lie here, whole, where there is float64."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    elsewhere = any(is_split(x) or x.is_meta or x.device.type == "mps" for x in own)
    return not elsewhere and not (hasattr(module, "weight") and fleeting(module))


@contextmanager
def _in_float64(layer: nn.Module) -> Iterator[None]:
    """In here a layer computes in float64, and what follows it stays in it; gradients reach its own parameters."""
    places: list[Any] = [held for m in layer.modules() for held in (m._parameters, m._buffers)]
    before = [held.copy() for held in places]
    mode = _Widened()
    handle = layer.register_forward_pre_hook(mode.widen)
    try:
        for held in places:  # with numbers that are not leaves, so that the graph goes on to the parameters
            floats = {name: x.double() for name, x in held.items() if x is not None and x.is_floating_point()}
            held.update(floats)
        with mode:
            yield
    finally:
        handle.remove()
        for held, own in zip(places, before, strict=True):
            held.update(own)


class _Widened(TorchFunctionMode):
    """Once a head was called, casts of float64 tensors to other floats leave them as they are: models cast logits."""

    begun = False

    def widen(self, linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """A head's arguments."""
        self.begun = True
        return (args[0].double(), *args[1:])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.begun and args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func in _NARROWING:
                return args[0]
            args = (args[0], *map(_widest, args[1:])) if func in _CASTS else args
            kwargs = {name: _widest(value) for name, value in kwargs.items()} if "dtype" in kwargs else kwargs
        return func(*args, **kwargs)


def _widest(argument: Any) -> Any:
    """An argument of a cast that names a float, with float64 in its place."""
    if isinstance(argument, torch.dtype) and argument.is_floating_point:
        return torch.float64
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.double()
    return argument
