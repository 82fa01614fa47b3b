"""`patch(model)`: a model's own forward runs unchanged over logits that are not computed.

The head's *instance* `forward` returns `LazyLogits` while the model is called for a loss. Such a call is noticed where
the model's forward begins: by hooks if the model is called, by an instance `forward` if that is called directly.
No class and no global is changed, and `unpatch` deletes what was set. Another objective is set as the model's
`loss_function` (by its official setter): a module that reads hidden states and head from the lazy logits. In models
that do not call it, the objective answers the cross-entropies of their logits (`hf_xent.lazy.objective`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from .. import losses
from ..lazy import PatchState
from ..losses.base import Loss
from ..losses.cross_entropy import CrossEntropy
from ..ops.request import Request
from .calls import ModelLoss
from .comparison import Comparison, run_both_ways
from .gathered import whole_weight
from .heads import checked_head, inner_of
from .hooks import is_lazy
from .installation import Installation, installation_of

Model = TypeVar("Model", bound=nn.Module)


def patch(  # noqa: PLR0913  one keyword per choice that the user has
    model: Model,
    loss: str | Loss | None = None,
    *,
    observe: tuple[str, ...] = (),
    always: bool = False,
    impl: str | None = None,
    memory_budget: int | None = None,
    tail: float = 0.0,
    verify: bool | Mapping[str, Any] = False,
) -> Model:
    """Make a language model compute its loss, or another one, without logits; the model is changed in place.

    Called with labels, the model returns its loss, and lazy `logits` that are computed when they are used. Patching
    again replaces the earlier patch. `patch_state(model)` counts calls in which the head cannot be streamed (under some
    adapters), and says why. The model takes `token_weights` in the shape of labels, too (`hf_xent.lazy.weighting`).

    Args:
        model: A transformers model with a language-modeling head, also inside the wrappers of PEFT, DDP or FSDP.
        loss: A registry name, with options after it as in 'focal:gamma=3', or a `hf_xent.losses.Loss`, in the place of
            the model's cross-entropy, whose targets it gets; None keeps the cross-entropy.
        observe: Names of statistics to sum beside the loss (see `PatchState.take`).
        always: Whether logits are lazy without labels too, for losses outside of the model, or of two models' logits.
        impl: 'reference', 'chunked' or 'triton' (see `hf_xent.vocab_stats`).
        memory_budget: Bytes of logits in memory at a time (see `hf_xent.vocab_stats`).
        tail: Relative error allowed in the gradient of the logits, to compress that of unlikely tokens (see
            `hf_xent.vocab_loss`); 0 is exact.
        verify: Whether to run a few tokens stock and patched, without the tail, and to raise an error if they differ;
            or the batch to run, as in `compare`.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no linear head; the loss is unknown, needs a teacher, or weights that FSDP1 split.
        RuntimeError: The verification failed; the model is as it was.
    """
    objective = losses.get(loss)
    if objective.needs_teacher:
        raise ValueError(
            f"loss is {loss!r}: it compares with a teacher, which a patched model does not have: call the loss itself"
        )
    objective.check_tail(tail)
    head = head_of(model)
    if type(objective).bind is not Loss.bind:
        objective = objective.bind(whole_weight(inner_of(model), head))
    unpatch(model)  # after all checks
    state = PatchState(Request(tuple(observe), impl=impl, memory_budget=memory_budget, tail=tail), always=int(always))
    installation = Installation(state)
    if objective != CrossEntropy():
        installation.objective = ModelLoss(objective, state)
    installation.install(model)
    if verify:
        report = compare(model, batch=None if isinstance(verify, bool) else verify)
        if not report.equal:
            unpatch(model)
            raise RuntimeError(
                f"{report.model} does not compute the same loss when patched and was left as it was: {report}"
            )
    return model


def ensure_patched(model: Model, **options: Any) -> Model:
    """Patch a model unless it is patched already; a forward that TRL has put on it since is taken over.

    Args:
        model: As in `patch`.
        **options: Those of `patch`, for a model that is not patched.

    Returns:
        The same model.

    Raises:
        ValueError: As in `patch`.
    """
    installation = installation_of(inner_of(model))
    if installation is None:
        return patch(model, **options)
    installation.take_over_fused_head(inner_of(model))
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`; does nothing to a model that was not patched.

    Args:
        model: The model, also inside wrappers.

    Returns:
        The same model, as it was before.
    """
    inner = inner_of(model)
    installation = installation_of(inner)
    if installation is not None:
        installation.remove(inner)
    return model


@contextmanager
def unpatched(model: Model) -> Iterator[Model]:
    """A context in which a model is not patched; afterwards it has the same patch as before, or none.

    Args:
        model: The model, also inside wrappers.

    Yields:
        The same model.
    """
    inner = inner_of(model)
    installation = installation_of(inner)
    unpatch(model)
    try:
        yield model
    finally:
        unpatch(model)  # if it was patched in the context
        if installation is not None:
            installation.install(model)


@contextmanager
def patched(model: Model, loss: str | Loss | None = None, **options: Any) -> Iterator[Model]:
    """A context in which a model is patched with these options alone; afterwards it is as it was before.

    The user's patch, if there is one, is removed in the context and put back afterwards, with its counts and sums.

    Args:
        model: As in `patch`.
        loss: As in `patch`.
        **options: Those of `patch`; `impl` and `memory_budget` are by default those of the user's patch.

    Yields:
        The same model.

    Raises:
        ValueError: As in `patch`.
        RuntimeError: As in `patch`.
    """
    installation = installation_of(inner_of(model))
    with unpatched(model):
        yield patch(model, loss, **({} if installation is None else installation.state.options) | options)


@contextmanager
def lazily(model: nn.Module) -> Iterator[None]:
    """A context in which a patched model's logits are lazy without labels too, for losses computed outside of it.

    What is done to them in the context is recorded, as with `patch(model, always=True)`.

    Args:
        model: The model, also inside wrappers.

    Raises:
        ValueError: The model is not patched.
    """
    state = patch_state(model)
    state.always += 1  # a count, since these contexts may overlap in any order
    try:
        yield
    finally:
        state.always -= 1


def compare(model: nn.Module, *, tokens: int = 24, batch: Mapping[str, Any] | None = None) -> Comparison:
    """Compare loss and every parameter's gradient, stock and patched, on a few tokens; the model is left as it was.

    The model's own loss is compared, whatever loss it may be patched with.

    Args:
        model: As in `patch`.
        tokens: How many random tokens to run, in two rows, if there is no batch.
        batch: Arguments of the model with labels among them, for one that takes more than `input_ids` and `labels`.

    Returns:
        How far the two runs differ, and whether that is more than rounding.

    Raises:
        ValueError: As in `patch`; or the model takes more than tokens (`main_input_name`), and there is no batch.
    """

    @contextmanager
    def streamed() -> Iterator[PatchState]:
        with patched(model):
            yield patch_state(model)

    return run_both_ways(model, lambda: unpatched(model), streamed, tokens if batch is None else batch)


def patch_state(model: nn.Module) -> PatchState:
    """The options, counts and sums of a patched model.

    Args:
        model: The model, also inside wrappers.

    Returns:
        The state itself, which the model keeps updating.

    Raises:
        ValueError: The model is not patched.
    """
    installation = installation_of(inner_of(model))
    if installation is None:
        raise ValueError(f"{type(model).__name__} is not patched: call hf_xent.patch(model) first")
    return installation.state


def seam_of(model: nn.Module) -> PatchState:
    """The earlier name of `hf_xent.patching.patch_state`."""
    warnings.warn("seam_of is now hf_xent.patching.patch_state: use the new name", DeprecationWarning, stacklevel=2)
    return patch_state(model)


def head_of(model: nn.Module) -> nn.Linear:
    """The linear layer that makes a model's logits, inside any wrappers.

    Args:
        model: A transformers model with a language-modeling head, also inside wrappers.

    Returns:
        The layer itself.

    Raises:
        ValueError: There is none, it is not a plain linear layer, or something else already replaced its forward.
    """
    return checked_head(inner_of(model), is_lazy)
