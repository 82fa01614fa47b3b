"""The methods that are measured, by name: `CONTESTANTS`; where each can run, and the settings it may choose from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..losses.cross_entropy import CrossEntropy
from . import methods, two_models
from .methods import Method
from .objectives import CAP, CAPPED, DIVERGENCES, PLAIN, REWARDED, SMOOTHED, SMOOTHING

Outputs = Callable[[Tensor, Tensor], dict[str, Tensor]]  # hidden, weight -> the tensors that the function writes to


def _runs_anywhere(device: str) -> str | None:
    return None


def _needs_compiler(device: str) -> str | None:
    if device != "cpu" or any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        return None
    return "torch.compile needs a C++ compiler on a CPU"


def _needs_auto_chunker(device: str) -> str | None:
    if device != "cuda":
        return "runs on CUDA alone"
    from torch._inductor import config  # not imported with torch, and slow

    return None if hasattr(config, "auto_chunker") else f"Inductor's chunks need torch 2.11, here {torch.__version__}"


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

    group: str = field(default="peers", kw_only=True)  # of GROUPS: those that share a process on a GPU
    objectives: Mapping[str, Method] = field(default_factory=dict, kw_only=True)  # functions of objectives but PLAIN

    @property
    def gated(self) -> bool:
        """Whether its gradients are checked; the floor has none."""
        return self.outputs is None

    def method(self, objective: str) -> Method | None:
        """Its function for an objective, or None if it has none."""
        return self.loss if objective == PLAIN else self.objectives.get(objective)


def for_objective(contestant: Contestant, objective: str) -> Contestant:
    """The contestant with its function for an objective that it has; dense objectives hold float32 logits, too."""
    method = contestant.method(objective)
    assert method is not None
    logits = contestant.logits if objective == PLAIN or not (contestant.logits and contestant.gated) else FLOAT32_LOGITS
    return replace(contestant, loss=method, logits=logits)


BASE, FLOOR = "dense", "three matmuls"
GROUPS = ("dense", "hf_xent", "peers")  # in the order in which they run
FLOAT32_LOGITS = 10  # 16-bit [N, V] tensors that an objective of float32 logits has in memory at once
OTHERS = (CAPPED, SMOOTHED, REWARDED)


def _of_divergences(method: Method) -> dict[str, Method]:
    """The functions of all objectives with a teacher."""
    return {name: partial(method, objective=name) for name in DIVERGENCES}


CONTESTANTS: dict[str, Contestant] = {
    BASE: Contestant(
        methods.dense,
        logits=3,
        group="dense",
        objectives={name: partial(methods.dense_float32, objective=name) for name in OTHERS}
        | _of_divergences(two_models.dense),
        about="plain torch, all logits at once",
    ),
    "dense float32 logits": Contestant(
        methods.dense_float32, logits=8, group="dense", about="the same from float32 logits, as transformers' own loss"
    ),
    "dense compiled": Contestant(
        methods.compiled,
        _needs_compiler,
        logits=2,
        group="dense",
        objectives={name: partial(methods.compiled, objective=name) for name in OTHERS},
        about="*dense* under `torch.compile`",
    ),
    "dense compiled chunks": Contestant(
        partial(methods.compiled, chunked=True),
        _needs_auto_chunker,
        group="dense",
        about="the same under `TORCHINDUCTOR_AUTO_CHUNKER=1`",
    ),
    FLOOR: Contestant(
        methods.matmuls,
        outputs=methods.matmul_outputs,
        logits=1,
        group="dense",
        objectives=dict.fromkeys(OTHERS, methods.matmuls) | dict.fromkeys(DIVERGENCES, two_models.matmuls),
        about="the matrix products alone, no softmax between them",
    ),
    "torch chunked": Contestant(
        methods.torch_chunked, _needs_torch_2_13, group="dense", about="`F.linear_cross_entropy`, default options"
    ),
    "torch chunked tuned": Contestant(
        methods.torch_chunked,
        _needs_torch_2_13,
        _torch_settings,
        group="dense",
        about="`F.linear_cross_entropy`, best chunk size by hand",
    ),
    "trl": Contestant(
        methods.trl,
        _needs_trl_kernel,
        objectives=_of_divergences(two_models.trl),
        about="TRL's fused head",
    ),
    "liger": Contestant(
        methods.liger,
        partial(_needs_cuda, "liger_kernel"),
        objectives={
            CAPPED: partial(methods.liger, softcap=CAP),
            SMOOTHED: partial(methods.liger, label_smoothing=SMOOTHING),
        },
        about="Liger's fused linear cross-entropy",
    ),
    "liger float32": Contestant(
        partial(methods.liger, accum_dtype=torch.float32),
        partial(_needs_cuda, "liger_kernel"),
        about="the same with a float32 accumulator of the weight gradient",
    ),
    # By default it leaves out gradient tiles whose entries are all below its filter (2^-12 in bfloat16): by design its
    # error depends on the data and may exceed twice that of dense. Its authors state no bound; we allow one percent.
    "cut_cross_entropy": Contestant(
        methods.cut,
        partial(_needs_cuda, "cut_cross_entropy"),
        tolerance=1e-2,
        objectives={CAPPED: partial(methods.cut, softcap=CAP)},
        about="Apple's, with its default gradient filter",
    ),
    "cut_cross_entropy exact": Contestant(
        partial(methods.cut, filter_eps=None),
        partial(_needs_cuda, "cut_cross_entropy"),
        objectives={CAPPED: partial(methods.cut, filter_eps=None, softcap=CAP)},
        about="the same without a filter",
    ),
    "quack": Contestant(
        methods.quack,
        partial(_needs_cuda, "quack"),
        about="Quack's chunked linear cross-entropy, default chunks",
    ),
    "hf_xent": Contestant(
        methods.eager,
        group="hf_xent",
        objectives={
            CAPPED: partial(methods.eager, softcap=CAP),
            SMOOTHED: partial(methods.eager, loss=CrossEntropy(label_smoothing=SMOOTHING)),
            REWARDED: partial(methods.eager, loss=methods.EntropyBonus()),
            **_of_divergences(two_models.streamed),
        },
        about="this package, as `patch` uses it",
    ),
    "hf_xent tail": Contestant(
        methods.eager,
        settings=_tail_settings,
        tolerance=3e-3,
        group="hf_xent",
        about="with the sparse tail, at the largest setting within its tolerance",
    ),
    "hf_xent recompute": Contestant(
        methods.recompute,
        group="hf_xent",
        objectives={REWARDED: methods.recompute_bonus},
        about="for any loss on top of the statistics",
    ),
    "hf_xent triton": Contestant(
        partial(methods.eager, impl="triton"),
        partial(_needs_cuda, "triton"),
        group="hf_xent",
        about="with the Triton kernels",
    ),
    "hf_xent map_logits": Contestant(methods.mapped, group="hf_xent", about="for functions of whole rows of logits"),
}
"""Name -> contestant, in the order of the result tables; ratios are to BASE and to FLOOR."""
