"""One training step without data: what is allocated when, as two runs on fake tensors tell.

Torch's FakeTensorMode runs a model's real forward and backward on tensors that have shapes and no numbers, and a
dispatch mode outside of it sees every storage appear and disappear. So the account is exact for any architecture, and
there is no table of them. Bytes are affine in the batch size: two runs, of two sequences and of three, give all others
(one alone would be laid out otherwise).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .attention import as_with_numbers

GRADIENTS, ACTIVATIONS, LOGITS = range(3)
BEFORE, HEAD, HEAD_BACKWARD, AFTER = range(4)
"""The parts of a step: up to the head, from it to the end of the loss, back to its input, the rest."""


@dataclass(frozen=True)
class Timeline:
    """Bytes alive after each allocation of one step, beside the weights."""

    part: NDArray[np.int64]  # [events], of BEFORE to AFTER
    alive: NDArray[np.float64]  # [events, 3], by GRADIENTS, ACTIVATIONS, LOGITS


@dataclass(frozen=True)
class Trace:
    """The timeline of a step as a function of the batch size; that of b sequences is `two + (b - 2) * more`."""

    part: NDArray[np.int64]
    two: NDArray[np.float64]
    more: NDArray[np.float64]

    @classmethod
    def of(cls, first: Timeline, second: Timeline) -> Self:
        """The function through the timelines of two and three sequences. Raises: ValueError if they do not match."""
        if len(first.part) != len(second.part):
            raise ValueError("model computes otherwise for three sequences than for two: its memory cannot be planned")
        return cls(first.part, first.alive, second.alive - first.alive)

    def alive(self, batch: float) -> NDArray[np.float64]:
        """Bytes by kind after each allocation of a step on this many sequences, [events, 3]."""
        return self.two + (batch - 2) * self.more


class _Watch(TorchDispatchMode):
    """Notes every storage that an operation returns, and when it is freed; `part` is set by hooks on the model."""

    def __init__(self) -> None:
        super().__init__()
        self.part = BEFORE
        self.serials: dict[int, int] = {}  # address of a storage that is alive -> its number
        self.sizes: list[int] = []  # by number
        self.born: list[int] = []  # the part of the step that made it, by number
        self.events: list[tuple[int, int, int]] = []  # number of a storage, +1 or -1, part

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # models ask whether masks hide nothing: they do not
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                self.note(x)
        return out

    def note(self, x: Tensor) -> int:
        """The number of a tensor's storage, which is counted from now on."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self.serials:
            serial = self.serials[key] = len(self.sizes)
            self.sizes.append(storage.nbytes())
            self.born.append(self.part)
            self.events.append((serial, 1, self.part))
            weakref.finalize(storage, self._freed, key)
        return self.serials[key]

    def _freed(self, key: int) -> None:
        self.events.append((self.serials.pop(key), -1, self.part))


def trace(model: Any, length: int, *, on_cpu: bool, autocast: torch.dtype | None, accumulate: bool) -> Trace:
    """The account of a forward and a backward of a model on torch's meta device, as they would be with numbers.

    Args:
        model: A model of transformers (or PEFT's around one) on the meta device, in training mode; it is changed.
        length: Tokens of a sequence.
        on_cpu: Whether attention is that of a CPU.
        autocast: The dtype that operations are cast to by `torch.autocast`, or None.
        accumulate: Whether gradients of an earlier batch exist already.

    Returns:
        What is alive after each allocation, for any batch size.

    Raises:
        ValueError: The step cannot be run without numbers.
    """
    try:
        with _fake(model), as_with_numbers(on_cpu=on_cpu):
            return Trace.of(*(_step(model, (batch, length), autocast, accumulate) for batch in (2, 3)))
    except RuntimeError as error:  # such as shapes that depend on numbers
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model is a {type(model).__name__}, whose step does not run without numbers ({reason}): choose another"
            " dtype or attention, or measure it"
        ) from error


def _step(model: Any, shape: tuple[int, int], autocast: torch.dtype | None, accumulate: bool) -> Timeline:
    """One step on fake token ids of this shape."""
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = torch.zeros(shape, dtype=torch.long)
    watch = _Watch()
    handle = _head_of(model).register_forward_pre_hook(lambda head, args: _enter_head(watch, args[0]))
    with watch:
        weights = {watch.note(x) for x in (*model.parameters(), *model.buffers())}
        for p in trained:
            p.grad = torch.empty_like(p) if accumulate else None
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = model(input_ids=ids, labels=ids, **_without_cache(model)).loss
        watch.part = HEAD_BACKWARD
        loss.backward()
        gradients = {watch.note(p.grad) for p in trained if p.grad is not None}
    handle.remove()
    return _timeline(watch, weights, gradients)


def _enter_head(watch: _Watch, hidden: Tensor) -> None:
    watch.part = HEAD
    if hidden.requires_grad:
        hidden.register_hook(lambda grad: _leave_head(watch, grad))


def _leave_head(watch: _Watch, grad: Tensor) -> None:
    watch.born[watch.note(grad)] = AFTER  # an input of the rest of the backward, no part of logits or loss
    watch.part = AFTER


def _timeline(watch: _Watch, weights: set[int], gradients: set[int]) -> Timeline:
    """The account of a step from its events."""
    kinds = [LOGITS if part in (HEAD, HEAD_BACKWARD) else ACTIVATIONS for part in watch.born]
    for serial in gradients:
        kinds[serial] = GRADIENTS
    rows = [(kinds[i], sign * watch.sizes[i], part) for i, sign, part in watch.events if i not in weights]
    changes = np.zeros((len(rows), 3))
    changes[np.arange(len(rows)), [kind for kind, _, _ in rows]] = [size for _, size, _ in rows]
    return Timeline(np.array([part for _, _, part in rows]), changes.cumsum(0))


def _fake(model: nn.Module) -> Any:
    """A mode in which a model's meta tensors are made fake ones of a CPU, whose kernels and autocast are chosen."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode, made = FakeTensorMode(), dict[Tensor, Any]()  # by the tensor that was before: some are tied
    with mode:
        for module in model.modules():
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for store in stores:
                for name, x in store.items():
                    if x is not None and x not in made:
                        fake = torch.empty(x.shape, dtype=x.dtype, device="cpu")
                        made[x] = nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake
                    store[name] = None if x is None else made[x]
    return mode


def _head_of(model: Any) -> nn.Module:
    head: nn.Module = model.get_output_embeddings()
    return head


def _without_cache(model: Any) -> dict[str, Any]:
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}
