"""Whether the head's operands are still what they were when the head was called."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import Head
from ..ops.compiled import LIBRARY
from ..ops.higher import under_function_transform
from ..ops.panels import Panels

_SYNCHRONOUS_DEVICES = ("cpu",)  # whose memory is read without waiting for queued work
_SAMPLE_SIZE = 4096  # at least so many numbers of an operand are compared, or all; up to twice as many per dimension


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor that a head was called with, and what shows whether it was changed since."""

    name: str
    tensor: Tensor
    version: int | None  # how often it was written to; None where torch does not count
    sample: Tensor | None  # bytes of some numbers: a fused optimizer, `.data` and NumPy write without being counted

    @staticmethod
    def of(name: str, tensor: Tensor) -> Operand:
        """The tensor as it is now."""
        return Operand(name, tensor, version(tensor), _sample(tensor))

    def changed(self, unread: bool) -> bool:
        """Whether it was written to or got other memory; for `unread` see `check`."""
        if self.version != version(self.tensor) or (self.sample is not None and _is_freed(self.tensor)):
            return True
        if self.sample is None or (unread and self.sample.device.type not in _SYNCHRONOUS_DEVICES):
            return False
        now = _sample(self.tensor)
        return now is not None and (now.device != self.sample.device or not torch.equal(now, self.sample))


Operands = tuple[Operand, ...]


def _snapshot(tensors: list[Tensor]) -> list[Tensor]:
    """The operator `hf_xent::snapshot`: for each tensor how often it was written to, and a sample of its bytes."""
    found = []
    for tensor in tensors:
        count, sample = version(tensor), _sample(tensor.detach())
        assert sample is not None
        found += [torch.tensor(-1 if count is None else count), sample]
    return found


def _fake_snapshot(tensors: list[Tensor]) -> list[Tensor]:
    found = []
    for tensor in tensors:
        size = math.prod(len(range(0, n, _step(n, tensor.ndim))) for n in tensor.shape)
        found += [torch.empty((), dtype=torch.int64), tensor.new_empty(size * tensor.element_size(), dtype=torch.uint8)]
    return found


LIBRARY.define("snapshot(Tensor[] tensors) -> Tensor[]")
LIBRARY.impl("snapshot", _snapshot, "CompositeExplicitAutograd")
torch.library.register_fake("hf_xent::snapshot", _fake_snapshot, lib=LIBRARY)


def operands_then(named: dict[str, Tensor], snapshot: list[Tensor]) -> Operands:
    """Operands as they were when a compiled program took a snapshot of them."""
    pairs = zip(named.items(), snapshot[::2], snapshot[1::2], strict=True)
    return tuple(
        Operand(name, tensor, None if count < 0 else int(count), sample) for (name, tensor), count, sample in pairs
    )


def operands_of(hidden: Tensor, raw: Head) -> Operands:
    """The operands of a call, as they are now."""
    named = [("hidden states", hidden), *raw.tensors.items()]
    if isinstance(raw.weight, Panels):
        named += [("weight", stored) for stored in raw.weight.stored.tensors()]
    return tuple(Operand.of(name, t) for name, t in named if t is not None)


def check(operands: Operands, unread: bool) -> None:
    """Raises: RuntimeError if an operand was changed in place, or freed, since the head was called.

    `unread` says that nothing differentiable was computed from them yet, so that no optimizer step can have followed.
    Then writes that torch does not count are not looked for on a GPU, where a training step would wait for the check.
    """
    for operand in operands:
        if operand.changed(unread):
            raise RuntimeError(
                f"these logits are computed when they are read, and the head's {operand.name} was modified in place"
                " since (for instance by optimizer.step()), or freed by FSDP: read what you need of them before that,"
                " as in `predictions = out.logits.argmax(-1)`, or keep `out.logits.dense()`"
            )


def version(t: Tensor) -> int | None:
    """How often a tensor was written to; None where torch does not count."""
    return None if t.is_inference() else t._version


def _is_freed(t: Tensor) -> bool:
    """Whether the memory of a tensor is gone: FSDP takes it from a gathered weight, and to read it then is a crash."""
    return t.numel() > 0 and t.untyped_storage().nbytes() == 0


def _sample(t: Tensor) -> Tensor | None:
    """Bytes of the numbers on a grid; None for a tensor whose values cannot be read (meta, traced, transformed)."""
    if type(t) not in (Tensor, torch.nn.Parameter) or t.is_meta:
        return None
    if torch.compiler.is_compiling() or under_function_transform(t):
        return None
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        grid = t[tuple(slice(None, None, _step(n, t.ndim)) for n in t.shape)]
        return grid.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def _step(length: int, dims: int) -> int:
    """The step of the grid along a dimension."""
    return max(1, length // round(_SAMPLE_SIZE ** (1 / max(1, dims))))
