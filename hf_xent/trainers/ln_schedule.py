"""When the norms of a model are removed: the options that name a schedule, and the callback that follows one."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..ln_free.removal import remove, sites
from ..ln_free.schedule import END, START, Schedule
from .base import Options

SHARES = {"scaled": ("start", "end", "taper"), "at_once": ("start", "taper")}
"""Schedule -> which of the options `removal_...` it takes; the schedules of the paper take none."""


@dataclass
class RemovalOptions(Options):
    """The options of a schedule; goes before a configuration of transformers in a class's bases.

    Raises:
        ValueError: A share of the steps is not in [0, 1).
    """

    ranges: ClassVar[dict[str, str]] = dict.fromkeys(("removal_start", "removal_end", "removal_taper"), "[0, 1)")

    schedule: str = field(
        default="scaled",
        metadata={
            "help": "'scaled' to the model's depth and the number of steps; 'gpt2', 'gpt2-medium', 'gpt2-large' or"
            " 'gpt2-xl' as in the paper; 'at_once' for all norms at one step, a control unless `removal_taper` is set."
        },
    )
    removal_start: float = field(
        default=START, metadata={"help": "Share of the steps before the first removal, for 'scaled' and 'at_once'."}
    )
    removal_end: float = field(
        default=END, metadata={"help": "Share of the steps before the last removal, for 'scaled'."}
    )
    removal_taper: float = field(
        default=0.0,
        metadata={
            "help": "Share of the steps over which a norm is removed, for 'scaled' and 'at_once'; 0 removes it at once."
        },
    )

    def check_schedule(self, schedule: Schedule | None = None) -> None:
        """Checks the options against a schedule, by default the one that is named.

        Raises:
            ValueError: An option is set that the schedule does not take, or `schedule` is not a `Schedule`.
        """
        if not isinstance(schedule, Schedule | None):
            raise ValueError(f"schedule is {schedule!r}: pass a Schedule, or name one in the configuration")
        taken = () if schedule is not None else SHARES.get(self.schedule, ())
        defaults = {field.name: field.default for field in fields(RemovalOptions)}
        reason = f"the schedule is {self.schedule!r}" if schedule is None else "a Schedule was passed"
        for name in ("start", "end", "taper"):
            value = getattr(self, f"removal_{name}")
            if name not in taken and value != defaults[f"removal_{name}"]:
                raise ValueError(f"removal_{name} is {value}, but {reason}, which does not take it: leave it out")

    def schedule_for(self, model: nn.Module, steps: int) -> Schedule:
        """The schedule that the configuration names.

        Args:
            model: The model whose norms are removed.
            steps: The number of optimizer steps of the training.

        Raises:
            ValueError: The name is unknown, or the shares of the steps are out of range.
        """
        if self.schedule not in SHARES:
            return Schedule.named(self.schedule)
        last = self.removal_start if self.schedule == "at_once" else self.removal_end
        if not 0 <= self.removal_taper < 1 - last:
            raise ValueError(
                f"removal_taper is {self.removal_taper} and the last removal begins at {last} of the steps: their sum"
                " must stay below 1"
            )
        taper = int(self.removal_taper * steps)
        if self.schedule == "scaled":
            return Schedule.scaled(model, steps, start=self.removal_start, end=self.removal_end, taper=taper)
        return Schedule.at_once(model, max(1, int(self.removal_start * steps)), taper)


class LNRemovalCallback(TrainerCallback):
    """Removes the norms of a wrapped model on schedule, under any `transformers.Trainer`.

    Wrap the model (`hf_xent.ln_free.wrap`) before the trainer resumes from a checkpoint.

    Args:
        schedule: When each norm is removed; without it, as the trainer's `LNRemovalConfig` says.
    """

    def __init__(self, schedule: Schedule | None = None):
        self._preset = self.schedule = schedule
        self._initial_shares: dict[str, float] | None = None  # removed shares when the current training began

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fixes the schedule for this number of steps.

        If the training starts over at its first step, as with `auto_find_batch_size`, the norms are restored first.

        Raises:
            ValueError: The schedule does not fit the model or the steps, or there is none.
        """
        model = kwargs["model"]
        if self._preset is None:
            if not isinstance(args, RemovalOptions):
                raise ValueError(f"args is a {type(args).__name__}, which names no schedule: pass one to the callback")
            self.schedule = args.schedule_for(model, state.max_steps)
        assert self.schedule is not None
        made_for_these_steps = self._preset is None and args.schedule in SHARES
        self.schedule.check(model, None if made_for_these_steps else state.max_steps)
        if self._initial_shares is not None and state.global_step == 0:
            for site, share in self._initial_shares.items():
                remove(model, site, share)
        self._initial_shares = {site.name: site.share for site in sites(model)}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keeps the norms removed."""
        self._initial_shares = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Removes the norms that are due at this step."""
        assert self.schedule is not None
        for site, share in self.schedule.due(state.global_step).items():
            remove(kwargs["model"], site, share)
