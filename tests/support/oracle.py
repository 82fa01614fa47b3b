"""What tests compare with: dense torch in the same dtype, dense torch in float64, and the project's one tolerance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_xent.ops import Head, Stats

NAMES = ("hidden", "weight", "bias", "payload_hidden", "payload_weight", "payload_bias")


def assert_no_worse(
    out: Tensor, same_dtype_torch: Tensor, truth: Tensor, factor: float = 2, atol: float = 1e-5, what: str = "result"
) -> None:
    """`out` is at most `factor` times as far from `truth` as torch in the same dtype, by the norm of the error."""
    assert out.shape == same_dtype_torch.shape == truth.shape, (
        f"{what}: {out.shape}, {same_dtype_torch.shape}, {truth.shape}"
    )
    ours, torchs = ((x.double() - truth.double()).norm() for x in (out, same_dtype_torch))
    bound = factor * torchs + atol
    assert ours <= bound, f"{what}: error {ours:.3e} exceeds {bound:.3e} = {factor} x torch's {torchs:.3e} + {atol}"


def assert_close_at_scale(found: Tensor, expected: Tensor, error: float, what: str = "result") -> None:
    """`found` is off by at most `error` times the largest number: what sums leave behind does not shrink with them."""
    atol = error * float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=error, atol=atol, msg=lambda m: f"{what}: {m}")


def statistics(z: Tensor, labels: Tensor, pay: Tensor | None = None) -> dict[str, Tensor]:
    """Every statistic of dense logits [N, V], from its definition."""
    logp = z.log_softmax(-1)
    p = z.softmax(-1)
    expected = (p * logp).sum(-1)
    target = z[torch.arange(len(z), device=z.device), labels]
    return {
        "lse": z.logsumexp(-1),
        "target": target,
        "mean": z.sum(-1) / z.shape[1],
        "entropy": -expected,
        "variance": (p * (logp - expected[:, None]).square()).sum(-1),
        **({} if pay is None else {"payload": (p * pay).sum(-1)}),
        "top": z.max(-1).indices,
        "rank": (z > target[:, None]).sum(-1),
        "log_sum_sq": p.square().sum(-1).log(),
    }


@dataclass(frozen=True)
class Polynomial:
    """A loss of whatever statistics it is told to use: sum_i c_i s_i + 0.05 s_i^2; 0 where all are 0."""

    uses: tuple[str, ...] = ("lse", "target")

    def of(self, stats: Stats) -> Tensor:
        """Per-token loss."""
        found = [getattr(stats, name) for name in self.uses]
        return sum((0.3 * i - 0.7) * s + 0.05 * s.square() for i, s in enumerate(found))


@dataclass(frozen=True)
class Case:
    """One problem in one dtype, with its answers in dense torch."""

    tensors: Mapping[str, Tensor]  # by NAMES; absent is None
    labels: Tensor  # [...]
    weight: Tensor  # [...] token weights
    scale: float = 1.0
    softcap: float | None = None
    payload_scale: float = 1.0
    payload_softcap: float | None = None

    @property
    def head(self) -> Head:
        """The first head."""
        return Head(self.tensors["weight"], self.tensors.get("bias"), self.scale, self.softcap)

    @property
    def payload(self) -> tuple[Tensor, Head] | None:
        """The second head and its hidden states."""
        if "payload_hidden" not in self.tensors:
            return None
        head = Head(
            self.tensors["payload_weight"], self.tensors.get("payload_bias"), self.payload_scale, self.payload_softcap
        )
        return self.tensors["payload_hidden"], head

    @property
    def leaves(self) -> list[Tensor]:
        """Tensors that want a gradient."""
        return [t for t in self.tensors.values() if t.requires_grad]

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype, as fresh leaves."""
        moved = {name: t.detach().to(dtype).requires_grad_(t.requires_grad) for name, t in self.tensors.items()}
        return replace(self, tensors=moved)

    def frozen(self, *names: str) -> Case:
        """The same problem where only tensors named otherwise train."""
        return replace(self, tensors={k: t.detach().requires_grad_(k not in names) for k, t in self.tensors.items()})

    def dense(self, ignore_index: int = -100) -> tuple[dict[str, Tensor], Tensor]:
        """Statistics [n] of the n valid rows in plain torch, and the rows' weights."""
        valid = self.labels != ignore_index
        hidden, head = self.tensors["hidden"][valid], self.head
        pay = None if self.payload is None else _logits(self.payload[0][valid], self.payload[1])
        return statistics(_logits(hidden, head), self.labels[valid], pay), self.weight[valid]

    def solve(self, loss: Polynomial) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Dense statistics and the gradients of the weighted sum of `loss`."""
        values, weight = self.dense()
        total = (loss.of(Stats(values, self.labels, weight != 0)) * weight).sum()
        return values, gradients(total, self.leaves)


def _logits(hidden: Tensor, head: Head) -> Tensor:
    raw = F.linear(hidden, head.weight, head.bias)
    raw = raw if raw.dtype == torch.float64 else raw.float()
    return raw * head.scale if head.softcap is None else head.softcap * torch.tanh(raw * head.scale / head.softcap)


def gradients(total: Tensor, leaves: list[Tensor], **options: bool) -> list[Tensor]:
    """Gradients of a scalar, zeros where there is none."""
    found = torch.autograd.grad(total, leaves, allow_unused=True, **options)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


def make(
    N: int,
    V: int,
    D: int,
    *,
    D2: int | None = None,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    ignore: Callable[[Tensor], Tensor] | None = None,
    **options: float | None,
) -> Case:
    """A random problem with logits of the order of 1 to 3. `D2` adds a payload, `ignore` picks rows without a label."""

    def leaf(*shape: int, gain: float = 1.0) -> Tensor:
        return (gain * torch.randn(*shape, dtype=torch.float64)).to(device, dtype).requires_grad_()

    tensors = {"hidden": leaf(N, D), "weight": leaf(V, D, gain=2 * D**-0.5)}
    if bias:
        tensors["bias"] = leaf(V)
    if D2 is not None:
        tensors |= {"payload_hidden": leaf(N, D2), "payload_weight": leaf(V, D2, gain=D2**-0.5)}
        if bias:
            tensors["payload_bias"] = leaf(V)
    labels, weight = torch.randint(V, (N,)).to(device), torch.rand(N)  # the same numbers on every device
    if ignore is not None:
        labels[ignore(torch.arange(N, device=device))] = -100
    return Case(tensors, labels, weight.to(device), **options)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.detach.default:  # the same tensor, not a new one
            return out
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            # meta tensors have no values, bytes are the interpreter copying its arguments
            if isinstance(tensor, Tensor) and tensor.dtype != torch.uint8 and not tensor.is_meta:
                self.numel = max(self.numel, tensor.numel())
        return out


class Allocations(TorchDispatchMode):
    """How many tensors of each shape operations returned, without views and what they wrote in place.

    Sums do not count: autograd adds gradients up in place, except while such a mode watches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {x.untyped_storage().data_ptr() for x in (*args, *kwargs.values()) if isinstance(x, Tensor)}
        out = func(*args, **kwargs)
        if func is torch.ops.aten.add.Tensor:
            return out
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and not tensor.is_meta and tensor.untyped_storage().data_ptr() not in given:
                self.shapes[tuple(tensor.shape)] += 1
        return out


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that torch has allocated on the CPU at a time while `run` ran, beyond those before it."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    found = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(found, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak
