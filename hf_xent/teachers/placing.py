"""Where a trainer puts its teachers, and which of them it cannot use for texts that are new."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .base import Teacher
from .local import LocalTeacher
from .several import SeveralTeachers
from .stored import StoredTeacher


def parts_of(teacher: Any) -> Iterator[Teacher]:
    """The teachers that a teacher asks (several, or one in another vocabulary), or itself."""
    asked = teacher.teachers if isinstance(teacher, SeveralTeachers) else [getattr(teacher, "teacher", None)]
    for part in asked:
        if part is None:
            yield teacher
        else:
            yield from parts_of(part)


def place(teacher: Teacher, device: torch.device) -> None:
    """Move a teacher's model to a device, unless it is quantized or split over devices, where it stays as it was."""
    if not isinstance(teacher, LocalTeacher):
        return
    model: Any = teacher.model
    if getattr(model, "hf_device_map", None) is None and not getattr(model, "is_quantized", False):
        model.to(device)


def refuse_known_texts(teacher: Teacher, on_policy: float) -> None:
    """Raises: ValueError if texts are to be sampled, but a teacher knows those of its cache alone."""
    if on_policy and any(isinstance(part, StoredTeacher) for part in parts_of(teacher)):
        raise ValueError(
            f"on_policy is {on_policy}, but a teacher is a cache, which has no answers about new texts: pass a model or"
            " a server, or set on_policy to 0"
        )
