"""Who is measured: mean cross-entropy of `hidden @ weight.T` against labels, one small function a method.

A contestant's function returns the scalar loss with its graph; `iterate` adds the backward. All see the same leaves:
hidden [N, D] and weight [V, D] in the run's dtype, labels [N] without ignored positions. FLOOR beside them has neither
loss nor gradients: it is the matmuls that no method can do without.
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
Outputs = Callable[[Tensor, Tensor], dict[str, Tensor]]  # hidden, weight -> what the function writes to


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
    """Torch's own chunked loss (2.13); without options its 'auto' choice."""
    return F.linear_cross_entropy(hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions(**options))


def trl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """TRL's fused head as its trainers call it, asked for log-probabilities alone."""
    from trl.kernels import ChunkedLogProbFunction

    # bias, targets, temperature, vocabulary tile (as trl.trainer.utils sets it), softcap, scale, outputs
    return -ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, ())[0].mean()


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Liger's fused linear cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


def cut(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Apple's cut cross-entropy, default implementation: its gradients leave out what is below its filter."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels)


def quack(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Quack's chunked linear cross-entropy, default chunks: gradients taken in the forward, three matmuls."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, labels)


@torch.no_grad()
def matmuls(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, logits: Tensor, hidden_out: Tensor, weight_out: Tensor
) -> Tensor:
    """The three matrix products of the shape and nothing between them: how fast a loss with gradients could be."""
    torch.mm(hidden, weight.T, out=logits)
    torch.mm(logits, weight, out=hidden_out)
    torch.mm(logits.T, hidden, out=weight_out)
    return hidden.detach()[0, 0]  # a scalar like the others'; one of the logits would keep all of them


def matmul_outputs(hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Where `matmuls` writes: filled, so that the first touch of a page is not timed."""
    sizes = {"logits": (len(hidden), len(weight)), "hidden_out": hidden.shape, "weight_out": weight.shape}
    return {name: hidden.new_ones(size) for name, size in sizes.items()}


def eager(hidden: Tensor, weight: Tensor, labels: Tensor, impl: str = "chunked", tail: float = 0.0) -> Tensor:
    """Ours as `patch` uses it: exact gradients with three matmuls, or compressed ones with little more than one."""
    return CrossEntropy()(hidden, Head(weight), labels, impl=impl, tail=tail)


def recompute(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Ours for any graph on top of the statistics: the backward recomputes the logits, four matmuls."""
    return vocab_stats(hidden, Head(weight), labels, outputs=("lse", "target"), impl="chunked").nll.mean()


def mapped(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Ours for functions of whole rows of logits: checkpointed chunks."""
    return map_logits(lambda z, y: F.cross_entropy(z, y, reduction="none"), hidden, Head(weight), labels).mean()


def _anywhere(device: str) -> str | None:
    return None


def _compiler(device: str) -> str | None:
    if device != "cpu" or any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        return None
    return "torch.compile needs a C++ compiler on a CPU"


def _torch_has_it(device: str) -> str | None:
    return (
        None
        if hasattr(F, "linear_cross_entropy")
        else f"F.linear_cross_entropy needs torch 2.13, here {torch.__version__}"
    )


def _installed(package: str, device: str) -> str | None:
    return None if find_spec(package) else f"{package} is not installed"


def _trl_kernel(device: str) -> str | None:
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError as error:
        return f"needs trl 1.16: {error}"
    return None if ChunkedLogProbFunction is not None else "trl has no kernel for this device"


def _on_cuda(package: str, device: str) -> str | None:
    return "runs on CUDA alone" if device != "cuda" else _installed(package, device)


def _no_settings(device: str, dtype: torch.dtype, tokens: int) -> dict[str, dict[str, Any]]:
    return {"": {}}


def _torch_settings(device: str, dtype: torch.dtype, tokens: int) -> dict[str, dict[str, Any]]:
    """Rows a chunk and accumulation policies that can win; 'auto' chunks are too thin for a CPU's matmuls."""
    sizes = (64, 128, 256, 512) if device == "cpu" else (512, 1024, 2048, 4096)
    policies = ("auto",) if dtype == torch.float32 else ("accurate",) if device == "cpu" else ("compact", "balanced")
    shape = [{"batch_chunk_size": size, "chunking_method": None} for size in sizes if size <= max(tokens, sizes[0])]
    settings = [{**size, "acc_policy": policy} for size in shape for policy in policies]
    return {f"batch_chunk_size={s['batch_chunk_size']} acc_policy={s['acc_policy']}": s for s in settings}


def _tail_settings(device: str, dtype: torch.dtype, tokens: int) -> dict[str, dict[str, Any]]:
    """Tolerances of the sparse tail; the gradients' errors come out a few times larger (benchmarks/results/tail.md)."""
    return {f"tail={tail:g}": {"tail": tail} for tail in (1e-3, 5e-4, 3e-4, 2e-4)}


@dataclass(frozen=True)
class Contestant:
    """A method: its function, where it can run, and the settings it may choose from (the fastest correct one wins)."""

    loss: Method
    available: Callable[[str], str | None] = _anywhere  # device type -> None, or why not
    settings: Callable[[str, torch.dtype, int], dict[str, dict[str, Any]]] = _no_settings
    about: str = field(default="", kw_only=True)  # what it is, for the legend of a table
    logits: int = field(default=0, kw_only=True)  # [N, V] tensors alive at once; not tried where these cannot fit
    tolerance: float = field(default=0.0, kw_only=True)  # relative gradient error it may have; 0: as exact as dense
    outputs: Outputs | None = field(default=None, kw_only=True)  # of the floor: allocated before its clock starts

    @property
    def gated(self) -> bool:
        """Whether there are gradients to check; the floor has none."""
        return self.outputs is None


BASE, FLOOR = "dense", "three matmuls"

CONTESTANTS: dict[str, Contestant] = {
    BASE: Contestant(dense, logits=3, about="plain torch, all logits at once"),
    "dense compiled": Contestant(compiled, _compiler, logits=2, about="the same under `torch.compile`"),
    FLOOR: Contestant(
        matmuls, outputs=matmul_outputs, logits=1, about="the matrix products alone, no softmax between them"
    ),
    "torch chunked": Contestant(torch_chunked, _torch_has_it, about="`F.linear_cross_entropy`, default options"),
    "torch chunked tuned": Contestant(
        torch_chunked, _torch_has_it, _torch_settings, about="`F.linear_cross_entropy`, best chunk size by hand"
    ),
    "trl": Contestant(trl, _trl_kernel, about="TRL's fused head"),
    "liger": Contestant(liger, partial(_on_cuda, "liger_kernel"), about="Liger's fused linear cross-entropy"),
    # By default it leaves out gradient tiles whose entries are all below its filter (2^-12 in bfloat16): its error
    # depends on the data and may pass twice dense's by design. Its authors state no bound; a percent is ours.
    "cut_cross_entropy": Contestant(
        cut, partial(_on_cuda, "cut_cross_entropy"), tolerance=1e-2, about="Apple's, with its default gradient filter"
    ),
    "quack": Contestant(quack, partial(_on_cuda, "quack"), about="Quack's chunked linear cross-entropy"),
    "hf_xent": Contestant(eager, about="this package, as `patch` uses it"),
    "hf_xent tail": Contestant(
        eager,
        settings=_tail_settings,
        tolerance=3e-3,
        about="with the sparse tail, at the largest setting within its tolerance",
    ),
    "hf_xent recompute": Contestant(recompute, about="for any loss on top of the statistics"),
    "hf_xent triton": Contestant(
        partial(eager, impl="triton"), partial(_on_cuda, "triton"), about="with the Triton kernels"
    ),
    "hf_xent map_logits": Contestant(mapped, about="for functions of whole rows of logits"),
}
"""Name -> contestant, in the order of the result tables; ratios are to BASE and to FLOOR."""
