"""Where a trainer puts its teachers, what it says of them, and which it cannot use for texts that are new."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models import prepare_deepspeed

from .base import Teacher
from .local import LocalTeacher
from .several import SeveralTeachers
from .stored import StoredTeacher
from .unadapted import UnadaptedTeacher


def parts_of(teacher: Any) -> Iterator[Teacher]:
    """The teachers that a teacher asks (several, or one in another vocabulary), or itself."""
    asked = teacher.teachers if isinstance(teacher, SeveralTeachers) else [getattr(teacher, "teacher", None)]
    for part in asked:
        if part is None:
            yield teacher
        else:
            yield from parts_of(part)


def place(teacher: LocalTeacher, accelerator: Any) -> None:
    """Move a teacher's model to a trainer's device, or partition it over the processes as ZeRO-3 does the student's.

    A model that is quantized or split over devices stays as it was.
    """
    model: Any = teacher.model
    if is_deepspeed_zero3_enabled():
        teacher.model = prepare_deepspeed(model, accelerator)
    elif getattr(model, "hf_device_map", None) is None and not getattr(model, "is_quantized", False):
        model.to(accelerator.device)


def described(teacher: Any) -> str:
    """A teacher in a few words without paths, for a card."""
    if isinstance(teacher, SeveralTeachers):
        pairs = zip(teacher.weights, teacher.teachers, strict=True)
        return " + ".join(f"{weight:g} {described(part)}" for weight, part in pairs)
    if isinstance(teacher, StoredTeacher):
        return "a cache"
    if isinstance(teacher, UnadaptedTeacher):
        return "the student without its adapters"
    name = str(getattr(teacher, "name", type(teacher).__name__))
    return "a local model" if Path(name).exists() else name


def refuse_known_texts(teacher: Teacher, on_policy: float) -> None:
    """Raises: ValueError if texts are to be sampled, but a teacher knows those of its cache alone."""
    if on_policy and any(isinstance(part, StoredTeacher) for part in parts_of(teacher)):
        raise ValueError(
            f"on_policy is {on_policy}, but a teacher is a cache, which has no answers about new texts: pass a model or"
            " a server, or set on_policy to 0"
        )
