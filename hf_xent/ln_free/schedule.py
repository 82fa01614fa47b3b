"""The schedule of a norm removal as data: at which step each norm is removed.

    mlp.l at start + l gap_mlp      qk.l at start_qk + l gap_qk      v.l at start_v + l gap_v      then the final norm

    start_qk = start + L gap_mlp      start_v = start_qk + L gap_qk      final = start_v + L gap_v

MLPs first was the most stable order for the authors; gaps let the loss fall again after each removal. `Schedule.named`
is the paper's table. `Schedule.scaled` (ours) keeps the proportions of the smallest size, removals from 1/15 to 26/75
of the steps (20 and 104 of 300) with gaps 2 : 2 : 3, for any depth and number of steps.

A removal may take several steps (ours): its share, that of `hf_xent.ln_free.remove`, grows by 1 / (taper + 1) in each.
With all norms at once and a long taper, the norms fade together, and every layer adapts while the other norms still act
in part.

Source: Baroni et al. 2025, arXiv:2507.02559, table of hyperparameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from ..options.ranges import check_count
from .removal import KINDS, sites

PAPER = {
    "gpt2": (12, 20, (2, 2, 3)),
    "gpt2-medium": (24, 20, (2, 2, 3)),
    "gpt2-large": (36, 30, (4, 4, 6)),
    "gpt2-xl": (48, 50, (4, 4, 6)),
}
"""Size -> layers, first step, gaps of mlp, qk and v."""
START, END, GAPS = 20 / 300, 104 / 300, (2, 2, 3)
"""The defaults of the scaled schedule: shares of the steps, proportions of the gaps."""


@dataclass(frozen=True)
class Schedule:
    """Removals in order, each at the beginning of its step.

    Args:
        events: (step, site); steps are counted from 0.
        taper: Number of further steps over which each removal is spread; 0 removes a norm in one step.

    Raises:
        ValueError: Steps or a taper that are not whole numbers, or are below 0.
    """

    events: tuple[tuple[int, str], ...]
    taper: int = 0

    def __post_init__(self) -> None:
        for name, value in (("taper", self.taper), *(("step", step) for step, _ in self.events)):
            check_count(name, value, 0)

    @classmethod
    def of(cls, names: Iterable[str], start: float, gaps: tuple[float, float, float]) -> Schedule:
        """A schedule of sites in order from a step on, each followed by its kind's gap; steps are rounded down.

        Args:
            names: The names of the sites.
            start: The step of the first removal.
            gaps: Number of steps after the removal of an mlp, a qk and a v site.

        Returns:
            The schedule.
        """
        gap_of = dict(zip(KINDS, (*gaps, 0.0), strict=True))
        events, step = [], start
        for name in names:
            events.append((int(step + 1e-6), name))
            step += gap_of[name.partition(".")[0]]
        return cls(tuple(events))

    @classmethod
    def named(cls, name: str) -> Schedule:
        """The paper's schedule.

        Args:
            name: 'gpt2', 'gpt2-medium', 'gpt2-large' or 'gpt2-xl'.

        Returns:
            The schedule.

        Raises:
            ValueError: The name is none of these.
        """
        if name not in PAPER:
            raise ValueError(f"schedule is {name!r}: choose {', '.join(PAPER)}, 'scaled' or 'at_once'")
        layers, start, gaps = PAPER[name]
        names = [f"{kind}.{layer}" for kind in KINDS[:3] for layer in range(layers)]
        return cls.of([*names, KINDS[3]], start, gaps)

    @classmethod
    def scaled(
        cls, model: nn.Module, steps: int, *, start: float = START, end: float = END, taper: int = 0
    ) -> Schedule:
        """The proportions of the paper's smallest size, for any depth and number of steps.

        Args:
            model: A wrapped model.
            steps: Number of steps of the training.
            start: The share of the steps before the first removal.
            end: The share of the steps before the last removal.
            taper: Number of further steps over which each removal is spread.

        Returns:
            The schedule.

        Raises:
            ValueError: Shares that are not 0 <= start <= end < 1, or a model that was not wrapped.
        """
        if not 0 <= start <= end < 1:
            raise ValueError(f"start is {start} and end {end}: choose shares of the steps, 0 <= start <= end < 1")
        names = [site.name for site in sites(model)]
        total = sum(GAPS[KINDS.index(name.partition(".")[0])] for name in names if name != KINDS[3])
        first = max(1.0, start * steps)  # at step 0 no norm has seen a batch
        unit = max(0.0, end * steps - first) / max(total, 1)
        gaps = (GAPS[0] * unit, GAPS[1] * unit, GAPS[2] * unit)
        return replace(cls.of(names, first, gaps), taper=taper)

    @classmethod
    def at_once(cls, model: nn.Module, step: int, taper: int = 0) -> Schedule:
        """Removes all norms at one step; without a taper, this is a control.

        Args:
            model: A wrapped model.
            step: The step of all removals.
            taper: Number of further steps over which each removal is spread.

        Returns:
            The schedule.

        Raises:
            ValueError: The model was not wrapped.
        """
        return cls(tuple((step, site.name) for site in sites(model)), taper)

    def due(self, step: int) -> dict[str, float]:
        """The sites that are removed by the beginning of a step, with their shares in (0, 1].

        Args:
            step: The step of the training, counted from 0.

        Returns:
            Site -> share, as `hf_xent.ln_free.remove` takes it.
        """
        shares = {site: min(1.0, (step - at + 1) / (self.taper + 1)) for at, site in self.events}
        return {site: share for site, share in shares.items() if share > 0}

    def check(self, model: nn.Module, steps: int | None = None) -> None:
        """Checks that the schedule fits a model and a number of steps.

        Args:
            model: A wrapped model.
            steps: Number of steps of the training; None skips this check.

        Raises:
            ValueError: It removes a site that the model does not have, or has not ended after so many steps.
        """
        known = {site.name for site in sites(model)}
        unknown = [site for _, site in self.events if site not in known]
        if unknown:
            raise ValueError(
                f"schedule removes {unknown[0]!r}, but {type(model).__name__} has {', '.join(sorted(known))}"
            )
        late = [(at, site) for at, site in self.events if steps is not None and at + self.taper >= steps]
        if late:
            at, site = late[0]
            raise ValueError(
                f"schedule removes {site!r} by step {at + self.taper}, counted from 0, but there are {steps} steps:"
                " raise max_steps, or choose another schedule"
            )
