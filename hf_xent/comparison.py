"""The proof of a patch: a model run stock and patched on the same tokens, loss and every gradient compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .lazy import LazyLogits
from .mode import evaluating


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
    streamed: int
    materialized: int
    tolerance: float

    @property
    def equal(self) -> bool:
        """Whether loss and every gradient agree to the tolerance of the dtype."""
        return self.loss_error <= self.tolerance and self.gradient_error <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        """The fields and the verdict, for JSON."""
        return {**asdict(self), "equal": self.equal, "lean": self.materialized == 0}


def run_both_ways(model: nn.Module, inner: nn.Module, state: Any, tokens: int) -> Comparison:
    """Compare a patched model (`inner` without its wrappers, `state` its patch); leaves it as it was."""
    objective = inner._modules.pop("_loss_function", None)
    head, seam = state.forwards[0].linear, state.seam
    tail, seam.tail = seam.tail, 0.0  # what is compared is the seam, not an approximation asked for
    state.objective, state.paused, state.awake = None, True, False
    try:
        with evaluating(inner):
            ids = _tokens(head.weight, tokens)
            stock = _loss_and_gradients(model, ids)
            state.paused = False
            before = (seam.streamed, seam.materialized)
            ours = _loss_and_gradients(model, ids)
            counts = (seam.streamed - before[0], seam.materialized - before[1])
            seam.take(training=False)
            recipe = _recipe(model, ids)
    finally:
        state.paused, state.awake = False, state.always
        seam.tail = tail
        if objective is not None:
            inner._loss_function = state.objective = objective
    return _comparison(inner, head, stock, ours, counts, recipe)


def _tokens(weight: Tensor, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(weight.shape[0], 2**15), (2, count // 2), generator=generator).to(weight.device)


def _loss_and_gradients(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        loss = model(input_ids=ids, labels=ids).loss
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True) if parameters else ()
    return loss.detach(), {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def _recipe(model: nn.Module, ids: Tensor) -> Any:
    with torch.no_grad():
        logits = model(input_ids=ids, labels=ids).logits
    return logits.head if isinstance(logits, LazyLogits) else None


def _comparison(inner: Any, head: nn.Linear, stock: Any, ours: Any, counts: tuple[int, int], recipe: Any) -> Comparison:
    total = sum(float(g.float().norm()) ** 2 for g in stock[1].values()) ** 0.5
    # some gradients are zero but for rounding (key biases): errors below a thousandth of the whole are no differences
    errors = {name: _relative(ours[1].get(name), g, floor=1e-3 * total) for name, g in stock[1].items()}
    worst = max(errors, key=errors.__getitem__, default="")
    embeddings = inner.get_input_embeddings()
    dtype = head.weight.dtype
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
        loss=float(stock[0]),
        loss_error=_relative(ours[0], stock[0]),
        gradient_error=errors.get(worst, 0.0),
        worst=worst,
        streamed=counts[0],
        materialized=counts[1],
        tolerance=5e-2 if dtype.itemsize == 2 else 1e-4,
    )


def _relative(ours: Tensor | None, stock: Tensor, floor: float = 1e-30) -> float:
    if ours is None:
        return float("inf")
    return float((ours.float() - stock.float()).norm()) / max(float(stock.float().norm()), floor)
