"""A teacher from whatever names one: an object, a model, a server's address, a cache folder, a path or Hub id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .base import Teacher
from .cache import is_cache

TAKEN = {
    "a teacher already": (),
    "a model": (),
    "a cache": ("tail",),
    "a server": ("tail", "model", "k", "concurrency", "api_key", "retries", "backoff", "timeout"),
    "a model's name": ("device", "dtype", "spans", "others"),
}
"""What a teacher is made of -> the options that have an effect on it."""


def load(
    spec: Any,
    *,
    tokenizer: Any = None,
    weights: Sequence[float] | None = None,
    **options: Any,
) -> Teacher:
    """A teacher.

    Args:
        spec: A teacher, which is returned as it is; a model; 'http://...' or 'https://...', a server; the folder of a
            cache; the path, Hub id or packaged name ('smollm2') of a causal LM; or a list of these. A model that is
            loaded and has another vocabulary than the student is asked in its own tokens.
        tokenizer: The student's tokenizer: to see that, and for servers that answer with the texts of tokens.
        weights: One number for each of a list; None weighs all alike.
        **options: `device` and `dtype` of a model that is loaded, `spans` and `others` of one with another vocabulary
            (`hf_xent.teachers.other_vocabulary`); `tail` of a cache or a server, what is assumed about
            the tokens that it does not have ('class', 'uniform' or 'student'); `model`, `k`, `concurrency`, `api_key`,
            `retries`, `backoff` and `timeout` of a server. One that is None is left at its default.

    Raises:
        ValueError: There is no such teacher, or an option has no effect on it; the message names it.
        RuntimeError: The server does not answer.
    """
    options = {name: value for name, value in options.items() if value is not None}
    specs = list(spec) if isinstance(spec, (list, tuple)) else [spec]
    kinds = [_kind(one) for one in specs]
    for name, value in options.items():
        if not any(name in TAKEN[kind] for kind in kinds):
            raise ValueError(
                f"{name} is {value!r}, which has no effect on {', '.join(dict.fromkeys(kinds))}: leave it out"
            )
    teachers = [
        _load(one, kind, tokenizer, {name: x for name, x in options.items() if name in TAKEN[kind]})
        for one, kind in zip(specs, kinds, strict=True)
    ]
    if isinstance(spec, (list, tuple)):
        from .several import SeveralTeachers

        return SeveralTeachers(teachers, weights)
    if weights is not None:
        raise ValueError(f"weights are {weights!r}, but there is one teacher: pass a list of teachers, or no weights")
    return teachers[0]


def _kind(spec: Any) -> str:
    """A key of `TAKEN`."""
    if isinstance(spec, nn.Module):
        return "a model"
    if hasattr(spec, "targets"):
        return "a teacher already"
    if str(spec).startswith(("http://", "https://")):
        return "a server"
    return "a cache" if is_cache(spec) else "a model's name"


def _load(spec: Any, kind: str, tokenizer: Any, options: dict[str, Any]) -> Teacher:
    """A teacher of a kind; its file is imported now."""
    if kind == "a teacher already":
        teacher: Teacher = spec
        return teacher
    if kind == "a server":
        from .served import ServedTeacher

        return ServedTeacher(spec, tokenizer=tokenizer, **options)
    if kind == "a cache":
        from .stored import StoredTeacher

        return StoredTeacher.from_folder(spec, **options)
    from .local import LocalTeacher

    return LocalTeacher(spec) if kind == "a model" else _named(spec, tokenizer, **options)


def _named(spec: Any, tokenizer: Any, dtype: Any = "auto", device: Any = None, **across: Any) -> Teacher:
    """A model that is loaded, in its own tokens if the student's are others."""
    from ..models import loading
    from .local import LocalTeacher
    from .other_vocabulary import for_student

    model, own = loading.load(str(spec), dtype)
    teacher = LocalTeacher(model if device is None else model.to(device))
    student = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if student is not None:
        return for_student(teacher, own, student, **across)
    for name, value in across.items():
        raise ValueError(f"{name} is {value!r}, but tokenizer is None: pass the student's, or leave {name} out")
    return teacher
