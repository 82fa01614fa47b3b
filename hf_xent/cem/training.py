"""One trial of a search: a training run and its evaluation under the trial's parameters, once for each seed.

A trainer that has `model_init` is used for all trials: its arguments, its accelerator and the state of its callbacks
are as before when a trial is over. A factory makes a trainer for each run.

Most options of a trainer can be set after it was made, but some are read only then: `label_smoothing_factor`,
`max_length` of TRL, the loss of `XentConfig`. Setting them would search over noise, so reads of the arguments are
watched while the trial runs, and `search` refuses an option that no trial has read.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from .trial import Trial

FACTORY = "pass search(make_trainer), a function of the trial that makes the trainer with the trial's parameters"


@dataclass
class Outcome:
    """What a trial has shown.

    Args:
        metrics: Those of its evaluation, for each seed.
        read: The arguments that were read while it ran.
        error: What ended it, or None.
    """

    metrics: list[dict[str, float]] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    error: str | None = None


def is_factory(source: Any) -> bool:
    """Whether this is a function that makes trainers, not a trainer."""
    return callable(source) and not hasattr(source, "train")


def takes_trial(factory: Callable[..., Any]) -> bool:
    """Whether a factory has to be called with the trial: it has an argument without a default."""
    parameters = inspect.signature(factory).parameters.values()
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _initialised_by_trial(trainer: Any) -> bool:
    """Whether the trainer calls its `model_init` with the trial: it has an argument, as transformers decides it."""
    return trainer.model_init is not None and bool(inspect.signature(trainer.model_init).parameters)


def made(source: Any, trial: Trial, seed: int = 0) -> Any:
    """The trainer of a trial: `source` itself, or what it makes after `transformers.set_seed(seed)`."""
    from transformers import set_seed

    if not is_factory(source):
        return source
    set_seed(seed)  # a factory draws the model's weights
    return source(trial) if takes_trial(source) else source()


def run_trial(source: Any, trial: Trial, settings: Mapping[str, Any], folder: Path, seeds: int) -> Outcome:
    """Train and evaluate with each seed.

    Args:
        source: A trainer with `model_init`, or a factory of trainers.
        trial: The trial, which `model_init` or the factory gets if it takes one.
        settings: Field of the training arguments -> value.
        folder: Where checkpoints go.
        seeds: How many seeds, from that of the arguments.

    Returns:
        The metrics, or the error that ended the trial.
    """
    outcome = Outcome()
    try:
        for seed in range(seeds):
            trainer = made(source, trial, seed)
            check_trainer(source, trainer)
            with _prepared(trainer, trial, settings, seed, outcome.read):
                trainer.args.output_dir = str(folder if seeds == 1 else folder / f"seed-{seed}")
                trainer.train()
                outcome.metrics.append(dict(trainer.evaluate()))
            if is_factory(source):
                del trainer  # before the next one is made
                gc.collect()
    except Exception as error:  # whatever it is, the next candidates are tried
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


@contextmanager
def _prepared(trainer: Any, trial: Trial, settings: Mapping[str, Any], seed: int, read: set[str]) -> Iterator[None]:
    """A trainer under the settings, whose reads of its arguments are noted; afterwards it is as it was."""
    args, model_init = trainer.args, trainer.model_init
    arguments, attributes = dict(vars(args)), _attributes(trainer)
    try:
        for name, value in settings.items():
            setattr(args, name, _converted(getattr(args, name), value))
        args.seed += seed
        if _initialised_by_trial(trainer):
            trainer.model_init = lambda: model_init(trial)
        with _watched(args, read):
            _renew(trainer)
            yield
    finally:
        vars(args).clear()
        vars(args).update(arguments)
        trainer.model_init, trainer.is_in_train = model_init, False
        for callback, values in attributes:
            vars(callback).update(values)
        trainer.optimizer = trainer.lr_scheduler = None
        _renew(trainer)


def _renew(trainer: Any) -> None:
    """What the trainer has derived from its arguments is derived again, as transformers does it between trials."""
    trainer._train_batch_size = trainer.args.train_batch_size
    trainer.create_accelerator_and_postprocess()


def _attributes(trainer: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Callback -> what it counts, such as evaluations without an improvement."""
    from transformers.trainer_callback import ExportableState

    callbacks = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ExportableState)]
    return [(callback, dict(callback.state()["attributes"])) for callback in callbacks]


def _converted(old: Any, value: Any) -> Any:
    """A value as the field has it: options such as `lr_scheduler_type` are members of an enumeration."""
    return type(old)(value) if isinstance(old, Enum) and value is not None else value


@contextmanager
def _watched(args: Any, read: set[str]) -> Iterator[None]:
    """Notes the names of the arguments that are read, by a subclass that the arguments belong to meanwhile."""
    base = type(args)
    names = {f.name for f in fields(args)}

    class Watched(base):  # type: ignore[misc, valid-type]
        def __getattribute__(self, name: str) -> Any:
            if name in names:
                read.add(name)
            return super().__getattribute__(name)

        def __reduce_ex__(self, protocol: Any) -> Any:  # checkpoints have the arguments: without the subclass
            return object.__new__, (base,), dict(vars(self))

        def to_dict(self) -> dict[str, Any]:  # what reports all of them uses none of them
            before = set(read)
            every: dict[str, Any] = super().to_dict()
            read.intersection_update(before)
            return every

    Watched.__name__, Watched.__qualname__ = base.__name__, base.__qualname__
    args.__class__ = Watched
    try:
        yield
    finally:
        args.__class__ = base


def check_trainer(source: Any, trainer: Any) -> None:
    """Refuse what cannot be searched, before anything is trained.

    Args:
        source: What `search` was given: the trainer, or a factory.
        trainer: The trainer.

    Raises:
        TypeError: If it is no trainer.
        ValueError: For the first thing that is wrong, with its remedy.
    """
    from transformers import Trainer

    if not isinstance(trainer, Trainer):
        kind = type(trainer).__name__
        raise TypeError(f"trainer is a {kind}: give a Trainer, or a function that makes one")
    args = trainer.args
    if not is_factory(source) and trainer.model_init is None:
        raise ValueError(f"trainer has no model_init, so a second trial would train the first one's model: {FACTORY}")
    if trainer.eval_dataset is None:
        raise ValueError("trainer has no eval_dataset: trials are compared by their evaluation, so pass one")
    if args.world_size > 1:
        raise ValueError(f"args.world_size is {args.world_size}: search in one process, and with processes= in several")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError("args has deepspeed or fsdp, whose state outlives a trial: search without, on one device")
    if args.push_to_hub:
        raise ValueError("args.push_to_hub is True, which would push every trial: set it in the run that follows")


def check_names(trainer: Any, names: list[str]) -> None:
    """Refuse names that a trial could not set.

    Raises:
        ValueError: For the first name that is no field of the trainer's arguments, unless `model_init` gets the trial.
    """
    known = {f.name for f in fields(trainer.args)}
    unknown = [name for name in names if name not in known]
    if unknown and not _initialised_by_trial(trainer):
        kind = type(trainer.args).__name__
        raise ValueError(f"{unknown[0]} is no field of {kind}: take it in model_init(trial), or {FACTORY}")
