"""Robust accuracy of held-out rows while a classifier is trained, in any trainer.

    robust = RobustAccuracy(rows, epsilon=8 / 255, steps=20, method="pgd", every="epoch")
    trainer = Trainer(model, args, train_dataset=..., processing_class=image_processor, callbacks=[robust])
    trainer.train()
    robust.rows                 # also in the trainer's log history: `clean_accuracy`, `robust_accuracy`

Robust accuracy is the share of rows that the attack could not make wrong. What it means, and the units of epsilon, are
those of `hf_xent.robust.attack`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from ..models.contexts import eval_mode_without_autocast
from ..options.ranges import check_count, is_number
from ..robust import attack, get
from ..robust.inputs import ball_of, target_of
from .whole import check_whole

EPOCH = "epoch"
CLEAN, ROBUST = "clean_accuracy", "robust_accuracy"


class RobustAccuracy(TrainerCallback):
    """Attacks held-out rows as a model is trained; see the module's docstring.

    It runs on the main process, in evaluation mode and without autocast, and changes neither the training nor its
    random numbers. `rows` has a dictionary for each measurement: `step`, `epoch`, `clean_accuracy`, `robust_accuracy`;
    a resumed training keeps those up to its checkpoint. The last model is always measured. Other processes wait for the
    main one at their next exchange: with several, choose so few rows and steps that their time limit is not reached.

    Args:
        held_out: The rows, as the trainer's data set has them, with labels: a sequence or a `datasets.Dataset`.
        epsilon: How far an input may be moved.
        steps: Passes of a row, at most.
        method: A name of `hf_xent.robust.ATTACKS`, with options if any, or an `Attack`.
        every: 'epoch', or the steps between two measurements.
        **options: `norm` ('inf') and `seed` (0) of the attack; `batch_size` (64); `processor`, the image processor,
            else the trainer's `processing_class`; `collate`, which makes a batch of a list of rows, else what the
            trainer's own batches are made by.

    Raises:
        ValueError: Options out of range or unknown; when the training begins, rows that the model cannot be attacked
            on, or weights that are split over processes.
    """

    def __init__(
        self,
        held_out: Sequence[Any],
        epsilon: float,
        steps: int = 20,
        method: Any = "pgd",
        every: int | str = EPOCH,
        **options: Any,
    ):
        if isinstance(every, str):
            if every != EPOCH:
                raise ValueError(f"every is {every!r}: choose a number of steps, or {EPOCH!r}")
        else:
            check_count("every", every, 1)
        check_count("steps", steps, 1)
        if not is_number(epsilon, "(0, inf)"):
            raise ValueError(f"epsilon is {epsilon!r}: choose a number above 0")
        if unknown := sorted(options.keys() - {"norm", "seed", "batch_size", "processor", "collate"}):
            raise ValueError(f"RobustAccuracy does not take {', '.join(unknown)}: see its docstring")
        check_count("batch_size", options.get("batch_size", 64), 1)
        if not len(held_out):
            raise ValueError("held_out is empty: give rows with labels")
        self.held_out, self.epsilon, self.steps, self.every = held_out, epsilon, steps, every
        self.method, self.options = get(method), options
        self.rows: list[dict[str, float]] = []
        self._batches: list[dict[str, Any]] = []
        self._processor: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the rows, and see that they can be attacked; called by the trainer."""
        if not state.is_world_process_zero:
            return
        model = kwargs["model"]
        check_whole(model, "attacks the rows: measure its checkpoints with hf_xent.robust.attack instead")
        collate = self.options.get("collate") or kwargs["train_dataloader"].collate_fn
        size = self.options.get("batch_size", 64)
        with _kept_random_numbers():  # a collator may draw some
            parts = [range(i, min(i + size, len(self.held_out))) for i in range(0, len(self.held_out), size)]
            self._batches = [_of_model(model, dict(collate([self.held_out[i] for i in part]))) for part in parts]
        self._processor = self.options.get("processor") or kwargs.get("processing_class")
        first = self._on(model, self._batches[0])
        ball_of(target_of(model, first, first["labels"]), self.epsilon, self._norm, self._processor)
        self.rows = [_row(entry) for entry in state.log_history if ROBUST in entry]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure if it is time; called by the trainer."""
        if self.every != EPOCH and state.global_step % int(self.every) == 0:
            self._measure(state, kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure if it is time; called by the trainer."""
        if self.every == EPOCH:
            self._measure(state, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the trained model; called by the trainer."""
        self._measure(state, kwargs["model"])

    @property
    def _norm(self) -> str:
        return str(self.options.get("norm", "inf"))

    def _on(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch on the model's device."""
        device = next(model.parameters()).device
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def _measure(self, state: Any, model: Any) -> None:
        """Add the row of this step, if it has none yet."""
        if not state.is_world_process_zero or any(row["step"] == state.global_step for row in self.rows):
            return
        clean = robust = count = 0
        given: Any = {"norm": self._norm, "processor": self._processor, "seed": self.options.get("seed", 0)}
        with eval_mode_without_autocast(model):
            for batch in self._batches:
                inputs = self._on(model, batch)
                labels = inputs.pop("labels")
                found = attack(model, inputs, labels, self.epsilon, self.steps, self.method, **given)
                clean, robust = clean + int(found.clean.sum()), robust + int((~found.flipped).sum())
                count += len(labels)
        entry = {CLEAN: clean / count, ROBUST: robust / count, "epoch": state.epoch, "step": state.global_step}
        state.log_history.append(entry)
        self.rows.append(_row(entry))


def _row(entry: Mapping[str, Any]) -> dict[str, float]:
    """A row from an entry of the log history."""
    return {name: entry[name] for name in ("step", "epoch", CLEAN, ROBUST)}


def _of_model(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """What the model reads of a batch; a trainer's own batches may have columns of its loss too.

    Raises:
        ValueError: The batch has no labels.
    """
    if "labels" not in batch:
        raise ValueError(f"held_out has rows without labels, of {', '.join(batch)}: give labels, or another collate")
    names: Callable[[str], bool] = signature(model.forward).parameters.__contains__
    return {name: value for name, value in batch.items() if names(name) or name == "labels"}


@contextmanager
def _kept_random_numbers() -> Iterator[None]:
    """A context that leaves random numbers on the CPU as they were."""
    python, drawn = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(drawn)
