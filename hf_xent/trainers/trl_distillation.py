"""TRL's `DistillationTrainer` with the kernels of this package: its data, sampling, metrics and logs stay.

    trainer = hf_xent.trainers.stream_distillation(trl.DistillationTrainer(student, teacher_model=teacher, ...))
    trainer.train()

TRL's loss runs the backbones and reads what follows them from the configurations: an adapter on the head is refused, or
ignored where it cannot be seen. Here both models run their own forward and return lazy logits, so whatever they do to
their logits counts. The divergence, the entropy and the divisor are TRL's:

    beta 0    KL(teacher || student)        1    KL(student || teacher)        between    generalized Jensen-Shannon

of both softmaxes at the trainer's temperature T; unlike `hf_xent.losses`, TRL does not multiply by T^2.

Source: Agarwal et al. 2024, On-Policy Distillation of Language Models, arXiv:2306.13649.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..lazy import LazyLogits
from ..losses.distillation import Distillation
from ..losses.forward_kl import ForwardKL
from ..losses.jsd import JSD
from ..losses.reverse_kl import ReverseKL
from ..ops import Head, Stats
from ..patching import ensure_patched, inner_of, lazily, patch_state
from ..patching.calls import parameters_of

Trainer = TypeVar("Trainer")
_NEEDED = ("_compute_loss", "_forward_redirection", "teacher_model", "beta", "temperature")


def stream_distillation(trainer: Trainer) -> Trainer:
    """Make a `trl.DistillationTrainer` compute its loss from lazy logits; this trainer alone is changed, in place.

    Student and teacher are patched, unless they are already.

    Args:
        trainer: Of TRL 1.16 or newer, or of a class derived from it that leaves the loss as it is.

    Returns:
        The same trainer.

    Raises:
        ValueError: It is another trainer, it has no teacher model, or a model cannot be patched.
    """
    found: Any = trainer
    missing = [name for name in _NEEDED if not hasattr(found, name)]
    if missing:
        raise ValueError(
            f"trainer is a {type(found).__name__} without {missing[0]}: pass a trl.DistillationTrainer of TRL 1.16 or"
            " newer"
        )
    if found.teacher_model is None:
        raise ValueError("trainer has no teacher_model, which its loss would be computed from: pass one to it")
    for model in (found.model, found.teacher_model):
        ensure_patched(model)
    found._compute_loss = MethodType(_compute_loss, found)
    return trainer


def _compute_loss(self: Any, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
    """TRL's method: the loss, the sum of the student's entropies, and the number of tokens, of the completions."""
    completion, mask = inputs["completion_ids"], inputs["completion_mask"]
    given = {
        **inputs,
        "input_ids": torch.cat([inputs["prompt_ids"], completion], 1),
        "attention_mask": torch.cat([inputs["prompt_mask"], mask], 1),
    }
    student = _logits_of(unwrapped_student, given, completion.shape[1])
    self.teacher_model.eval()
    unwrapped_teacher = self.accelerator.unwrap_model(self.teacher_model)
    with torch.no_grad():  # through the wrapper, which gathers the weights
        teacher = self._forward_redirection(
            self.teacher_model, unwrapped_teacher, _logits_of, unwrapped_teacher, given, completion.shape[1]
        )
    if student.hidden.device != teacher.hidden.device:
        raise ValueError(
            f"the student's head is on {student.hidden.device} but the teacher's on {teacher.hidden.device}: place both"
            " on one device in their device_map"
        )
    counted = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
    labels = torch.where(counted != 0, completion, -100).to(student.hidden.device)
    objective, state = _objective(self.beta), patch_state(unwrapped_student)

    def divergence(hidden: Tensor, head: Head) -> tuple[Tensor, Stats]:
        def to_teacher(second: Tensor, second_head: Head) -> tuple[Tensor, Stats]:
            return objective.compute(
                hidden,
                head.tempered(self.temperature),
                labels,
                teacher=(second, second_head.tempered(self.temperature)),
                num_items=num_items_in_batch,
                observe=("entropy",),
                **state.options,
            )

        return teacher.with_head(to_teacher)

    loss, stats = student.with_head(divergence)
    return state.counted(loss, stats), stats.entropy.sum(), stats.mask.sum()


def _objective(beta: float) -> Distillation:
    """The divergence that TRL means by its beta."""
    return ForwardKL() if beta == 0 else ReverseKL() if beta == 1 else JSD(beta=beta)


def _logits_of(model: Any, inputs: dict[str, Any], count: int) -> LazyLogits:
    """The lazy logits that predict the last `count` tokens [B, count, V].

    Raises:
        RuntimeError: The model made its logits, for a reason that the message names.
    """
    ensure_patched(model)
    kind: Any = type(inner_of(model))
    names = parameters_of(kind)
    passed = {name: x for name, x in inputs.items() if name in names and name != "labels"}
    if "logits_to_keep" in names:
        passed["logits_to_keep"] = count + 1  # the last one predicts nothing
    with lazily(model):
        logits = model(**passed, use_cache=False).logits[:, :-1][:, -count:]
    if not isinstance(logits, LazyLogits) or logits.is_dense:
        reason = patch_state(model).why_dense or "something has made them"
        raise RuntimeError(f"{type(model).__name__} has no lazy logits: {reason}; train with trl.DistillationTrainer")
    return logits
