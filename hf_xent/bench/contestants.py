"""The methods that are measured: mean cross-entropy of `hidden @ weight.T` with labels, one small function each.

The function of a contestant returns the scalar loss with its graph; `iterate` adds the backward. All get these leaves:
hidden [N, D] and weight [V, D] in the run's dtype, labels [N] without ignored positions. FLOOR has neither a
loss nor gradients: it is the matmuls that every method needs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..losses.cross_entropy import CrossEntropy
from ..ops import Head, map_logits, vocab_stats

Method = Callable[..., Tensor]
Outputs = Callable[[Tensor, Tensor], dict[str, Tensor]]  # hidden, weight -> the tensors that the function writes to


def iterate(loss: Method, hidden: Tensor, weight: Tensor, labels: Tensor, **setting: Any) -> Tensor:
    """One iteration: the detached loss, with fresh gradients in `hidden.grad` and `weight.grad`."""
    hidden.grad = weight.grad = None
    value = loss(hidden, weight, labels, **setting)
    if value.requires_grad:  # all but the floor
        value.backward()
    return value.detach()


def dense(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Plain torch: all logits at once, in the inputs' dtype."""
    return F.cross_entropy(F.linear(hidden, weight), labels)


def compiled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Plain torch under torch.compile, default mode."""
    return _compile()(hidden, weight, labels)


@cache
def _compile() -> Method:
    return torch.compile(dense, dynamic=False)


def torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Torch's chunked loss (since 2.13); without options, torch chooses the chunks ('auto')."""
    return F.linear_cross_entropy(hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions(**options))


def trl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """TRL's fused head as its trainers call it, with log-probabilities as its only output."""
    from trl.kernels import ChunkedLogProbFunction

    # bias, targets, temperature, vocabulary tile (as trl.trainer.utils sets it), softcap, scale, outputs
    return -ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, ())[0].mean()


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Liger's fused linear cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


def cut(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Apple's cut cross-entropy, default implementation: its gradients leave out entries below its filter."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels)


def quack(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Quack's chunked linear cross-entropy, default chunks: the forward computes the gradients, three matmuls."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, labels)


@torch.no_grad()
def matmuls(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, logits: Tensor, hidden_out: Tensor, weight_out: Tensor
) -> Tensor:
    """The three matrix products of the shape and nothing else: a lower bound for the time of a loss with gradients."""
    torch.mm(hidden, weight.T, out=logits)
    torch.mm(logits, weight, out=hidden_out)
    torch.mm(logits.T, hidden, out=weight_out)
    return hidden.detach()[0, 0]  # a scalar, as for the others; a view of the logits would keep all of them alive


def matmul_outputs(hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The tensors that `matmuls` writes to, filled so that the first access to a memory page is not timed."""
    sizes = {"logits": (len(hidden), len(weight)), "hidden_out": hidden.shape, "weight_out": weight.shape}
    return {name: hidden.new_ones(size) for name, size in sizes.items()}


def eager(hidden: Tensor, weight: Tensor, labels: Tensor, impl: str = "chunked", tail: float = 0.0) -> Tensor:
    """Our loss as `patch` uses it: exact gradients with three matmuls, or compressed ones with little more than one."""
    return CrossEntropy()(hidden, Head(weight), labels, impl=impl, tail=tail)


def recompute(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Our loss for any function of the statistics: the backward recomputes the logits, four matmuls."""
    return vocab_stats(hidden, Head(weight), labels, outputs=("lse", "target"), impl="chunked").nll.mean()


def mapped(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Our loss for functions of whole rows of logits, in checkpointed chunks."""
    return map_logits(lambda z, y: F.cross_entropy(z, y, reduction="none"), hidden, Head(weight), labels).mean()


def _runs_anywhere(device: str) -> str | None:
    return None


def _needs_compiler(device: str) -> str | None:
    if device != "cpu" or any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        return None
    return "torch.compile needs a C++ compiler on a CPU"


def _needs_torch_2_13(device: str) -> str | None:
    return (
        None
        if hasattr(F, "linear_cross_entropy")
        else f"F.linear_cross_entropy needs torch 2.13, here {torch.__version__}"
    )


def _needs_package(package: str, device: str) -> str | None:
    return None if find_spec(package) else f"{package} is not installed"


def _needs_trl_kernel(device: str) -> str | None:
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError as error:
        return f"needs trl 1.16: {error}"
    return None if ChunkedLogProbFunction is not None else "trl has no kernel for this device"


def _needs_cuda(package: str, device: str) -> str | None:
    return "runs on CUDA alone" if device != "cuda" else _needs_package(package, device)


def _no_settings(device: str, dtype: torch.dtype, tokens: int) -> dict[str, dict[str, Any]]:
    return {"": {}}


def _torch_settings(device: str, dtype: torch.dtype, tokens: int) -> dict[str, dict[str, Any]]:
    """Rows per chunk and accumulation policies that can be fastest; 'auto' chunks are too small for a CPU's matmuls."""
    sizes = (64, 128, 256, 512) if device == "cpu" else (512, 1024, 2048, 4096)
    policies = ("auto",) if dtype == torch.float32 else ("accurate",) if device == "cpu" else ("compact", "balanced")
    shape = [{"batch_chunk_size": size, "chunking_method": None} for size in sizes if size <= max(tokens, sizes[0])]
    settings = [{**size, "acc_policy": policy} for size in shape for policy in policies]
    return {f"batch_chunk_size={s['batch_chunk_size']} acc_policy={s['acc_policy']}": s for s in settings}


def _tail_settings(device: str, dtype: torch.dtype, tokens: int) -> dict[str, dict[str, Any]]:
    """Tolerances of the sparse tail; the gradients' errors are a few times larger (benchmarks/results/tail.md)."""
    return {f"tail={tail:g}": {"tail": tail} for tail in (1e-3, 5e-4, 3e-4, 2e-4)}


@dataclass(frozen=True)
class Contestant:
    """A method: its function, where it can run, and the settings it may choose from (the fastest correct one wins)."""

    loss: Method
    available: Callable[[str], str | None] = _runs_anywhere  # device type -> None, or the reason why it cannot run
    settings: Callable[[str, torch.dtype, int], dict[str, dict[str, Any]]] = _no_settings
    about: str = field(default="", kw_only=True)  # its description in the legend of a table
    logits: int = field(default=0, kw_only=True)  # [N, V] tensors in memory at once; it is skipped if these do not fit
    tolerance: float = field(default=0.0, kw_only=True)  # allowed relative gradient error; 0: as exact as dense
    outputs: Outputs | None = field(default=None, kw_only=True)  # of the floor only: allocated before its time starts

    @property
    def gated(self) -> bool:
        """Whether its gradients are checked; the floor has none."""
        return self.outputs is None


BASE, FLOOR = "dense", "three matmuls"

CONTESTANTS: dict[str, Contestant] = {
    BASE: Contestant(dense, logits=3, about="plain torch, all logits at once"),
    "dense compiled": Contestant(compiled, _needs_compiler, logits=2, about="the same under `torch.compile`"),
    FLOOR: Contestant(
        matmuls, outputs=matmul_outputs, logits=1, about="the matrix products alone, no softmax between them"
    ),
    "torch chunked": Contestant(torch_chunked, _needs_torch_2_13, about="`F.linear_cross_entropy`, default options"),
    "torch chunked tuned": Contestant(
        torch_chunked, _needs_torch_2_13, _torch_settings, about="`F.linear_cross_entropy`, best chunk size by hand"
    ),
    "trl": Contestant(trl, _needs_trl_kernel, about="TRL's fused head"),
    "liger": Contestant(liger, partial(_needs_cuda, "liger_kernel"), about="Liger's fused linear cross-entropy"),
    # By default it leaves out gradient tiles whose entries are all below its filter (2^-12 in bfloat16): by design its
    # error depends on the data and may exceed twice that of dense. Its authors state no bound; we allow one percent.
    "cut_cross_entropy": Contestant(
        cut,
        partial(_needs_cuda, "cut_cross_entropy"),
        tolerance=1e-2,
        about="Apple's, with its default gradient filter",
    ),
    "quack": Contestant(quack, partial(_needs_cuda, "quack"), about="Quack's chunked linear cross-entropy"),
    "hf_xent": Contestant(eager, about="this package, as `patch` uses it"),
    "hf_xent tail": Contestant(
        eager,
        settings=_tail_settings,
        tolerance=3e-3,
        about="with the sparse tail, at the largest setting within its tolerance",
    ),
    "hf_xent recompute": Contestant(recompute, about="for any loss on top of the statistics"),
    "hf_xent triton": Contestant(
        partial(eager, impl="triton"), partial(_needs_cuda, "triton"), about="with the Triton kernels"
    ),
    "hf_xent map_logits": Contestant(mapped, about="for functions of whole rows of logits"),
}
"""Name -> contestant, in the order of the result tables; ratios are to BASE and to FLOOR."""
