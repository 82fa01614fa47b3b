"""TRL's fused head on a patched model: `model(..., labels=labels, fused_lm_head=True)`.

From version 1.15 on, TRL's trainers put a forward of their own on the model (`trl.trainer.utils.add_fused_lm_head`)
that, if it is called like this, runs the backbone, reads what follows it from the configuration, and returns per-token
log-probabilities. A patched model computes these itself: its own forward runs without labels, and the statistics come
from the lazy logits. So they include whatever follows the head (a LoRA branch, an unusual scale), whether the trainer
or the patch came first, and copies of the model use their own weights.

With `cast_lm_head_to_fp32`, GRPO's trainer makes the head's weight float32 and puts a forward on the head that
multiplies in float32, outside of autocast. A patched head does the same: its lazy logits are float32, of hidden states
and weights in whatever dtype they have, and no float32 copy of either is made.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ..lazy import LazyLogits
from ..ops import Stats, dense_stats
from ..ops.statistics import wide

STATISTICS = {
    "log_probs": (),  # always computed
    "entropy": ("entropy",),
    "log_sum_sq_probs": ("log_sum_sq",),
    "mean_logits": ("mean",),
    "is_top1": ("top",),
}
_ARGUMENTS = ("fused_lm_head", "labels", "shift_labels", "num_items_in_batch")


@dataclass(frozen=True)
class FusedHead:
    """What a trainer passed to `add_fused_lm_head`, read from the forward that this left on the model."""

    temperature: float = 1.0
    outputs: tuple[str, ...] = tuple(STATISTICS)
    cast_lm_head_to_fp32: bool = False
    forward: Any = None

    @classmethod
    def installed(cls, model: nn.Module) -> FusedHead | None:
        """TRL's fused head on a model, also under the wrappers of accelerate; None if there is none."""
        forward = model.__dict__.get("forward")
        function = getattr(forward, "__func__", forward)
        while function is not None and not _is_fused_forward(function):
            function = getattr(function, "__wrapped__", None)
        if function is None:
            return None
        settings = inspect.getclosurevars(function).nonlocals
        names = ("temperature", "outputs", "cast_lm_head_to_fp32")
        return cls(**{name: settings[name] for name in names}, forward=forward)

    @staticmethod
    def remove(model: nn.Module) -> None:
        """Take TRL's forward off a model that no longer needs it, unless something else has wrapped it."""
        function: Any = getattr(model.__dict__.get("forward"), "__func__", None)
        if not _is_fused_forward(function):
            return
        original = inspect.getclosurevars(function).nonlocals["original_forward"]
        del model.__dict__["forward"]
        if getattr(original, "__self__", None) is model and original != MethodType(type(model).forward, model):
            model.__dict__["forward"] = original  # it was also set on the instance

    def restore(self, model: nn.Module, below: Any) -> None:
        """Put back the forward that `remove` took off, over `below`, unless something else is there now."""
        if self.forward is not None and model.__dict__.get("forward") in (None, below):
            model.__dict__["forward"] = self.forward


def is_float32_forward(function: Any) -> bool:
    """Whether a head's forward is the one that GRPO's trainer puts there for `cast_lm_head_to_fp32`."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_qualname.endswith("_cast_lm_head_to_fp32.<locals>.cast_forward_to_fp32")


def _is_fused_forward(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and code.co_qualname.startswith("add_fused_lm_head.")


@dataclass(frozen=True)
class FusedCall:
    """One such call: what the caller passed, and the arguments that the model's own forward gets."""

    head: FusedHead
    labels: Tensor  # aligned with the logits, or the model's own if `shift`
    shift: bool
    num_items: Any
    aux_weight: float | None  # of the auxiliary loss, if the model computes it
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, model: Any, head: FusedHead | None, kwargs: dict[str, Any]) -> FusedCall:
        """The call, for a patched model to compute."""
        head = head or FusedHead()
        shift = kwargs.get("shift_labels") is None
        labels = kwargs["labels" if shift else "shift_labels"]
        passed = {name: value for name, value in kwargs.items() if name not in _ARGUMENTS}
        if "use_cache" in inspect.signature(type(model).forward).parameters:
            passed["use_cache"] = False
        config = model.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            passed.setdefault("output_router_logits", True)
        weight = getattr(config, "router_aux_loss_coef", 0.0) if passed.get("output_router_logits") else None
        return cls(head, labels, shift, kwargs.get("num_items_in_batch"), weight, passed)

    def answer(self, output: Any) -> Any:
        """TRL's output, from that of the model."""
        try:
            from trl.trainer.utils import FusedCausalLMOutput
        except ImportError as error:
            raise ImportError("fused_lm_head is True, which needs TRL: install TRL 1.16 or newer") from error

        logits, labels = output.logits, self.labels.to(output.logits.device)
        if self.head.cast_lm_head_to_fp32 and logits.dtype != wide(logits.dtype):
            raise RuntimeError(
                f"cast_lm_head_to_fp32 is True, but the model made its logits in {logits.dtype} before they were read"
                " (an adapter on the head, or an unusual operation after it): leave cast_lm_head_to_fp32 off"
            )
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        if self.head.temperature != 1:
            logits = logits / self.head.temperature
        statistics = {name for output in self.head.outputs for name in STATISTICS[output]}
        stats = _stats(logits, labels, ("lse", "target", *sorted(statistics)))
        logp = stats.logp
        count = stats.mask.sum().clamp(min=1) if self.num_items is None else self.num_items
        loss, aux = -logp.sum() / count, None
        if self.aux_weight is not None:
            aux = output.aux_loss
            loss = loss + self.aux_weight * aux
        formulas = {
            "entropy": lambda: stats.entropy,
            "log_sum_sq_probs": lambda: stats.log_sum_sq.detach(),
            "mean_logits": lambda: stats.mean.detach(),
            "is_top1": lambda: stats.is_top1,
        }
        outputs = {name: formula() for name, formula in formulas.items() if name in self.head.outputs}
        return FusedCausalLMOutput(loss=loss, log_probs=logp, label_mask=stats.mask, aux_loss=aux, **outputs)


def _stats(logits: Tensor, labels: Tensor, outputs: tuple[str, ...]) -> Stats:
    if isinstance(logits, LazyLogits) and not logits.is_dense:
        stats = logits.stats(labels, outputs=outputs)
        logits.state.record(stats.detach())
        return stats
    return dense_stats(logits, labels, outputs=outputs)
