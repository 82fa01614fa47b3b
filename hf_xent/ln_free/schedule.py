"""When which norm goes: a removal schedule as data.

    mlp.l at start + l gap_mlp      qk.l at start_qk + l gap_qk      v.l at start_v + l gap_v      then the final norm

    start_qk = start + L gap_mlp      start_v = start_qk + L gap_qk      final = start_v + L gap_v

MLPs first was the most stable order for the authors; gaps let the loss come down after each removal. `Schedule.named`
is the paper's table. `Schedule.scaled` (ours) keeps the proportions of the smallest size, removals from 1/15 to 26/75
of the steps (20 and 104 of 300) with gaps 2 : 2 : 3, for any depth and number of steps.

A removal may take more steps than one (ours): its share, that of `hf_xent.ln_free.remove`, grows by 1 / (taper + 1) in
each. At once and with a long taper, all norms fade together, and every layer learns to go without while all others are
still held a little.

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
"""Of the scaled schedule: shares of the steps, proportions of the gaps."""


@dataclass(frozen=True)
class Schedule:
    """Removals in order, each at the beginning of its step.

    Args:
        events: (step, site), step 0 being the first.
        taper: Steps that each removal takes from then on; 0 is all of it at once.

    Raises:
        ValueError: Steps or a taper that are no whole numbers, or below 0.
    """

    events: tuple[tuple[int, str], ...]
    taper: int = 0

    def __post_init__(self) -> None:
        for name, value in (("taper", self.taper), *(("step", step) for step, _ in self.events)):
            check_count(name, value, 0)

    @classmethod
    def of(cls, names: Iterable[str], start: float, gaps: tuple[float, float, float]) -> Schedule:
        """Sites in order from a step on, each followed by the gap of its kind; steps are rounded down.

        Args:
            names: Of the sites.
            start: The first removal's step.
            gaps: Steps after a removal of an mlp, a qk and a v site.

        Returns:
            The schedule.
        """
        following = dict(zip(KINDS, (*gaps, 0.0), strict=True))
        events, step = [], start
        for name in names:
            events.append((int(step + 1e-6), name))
            step += following[name.partition(".")[0]]
        return cls(tuple(events))

    @classmethod
    def named(cls, name: str) -> Schedule:
        """The paper's schedule.

        Args:
            name: 'gpt2', 'gpt2-medium', 'gpt2-large' or 'gpt2-xl'.

        Returns:
            The schedule.

        Raises:
            ValueError: Another name.
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
            steps: Of the training.
            start: The share of them before the first removal.
            end: The share before the final one.
            taper: Steps that each removal takes.

        Returns:
            The schedule.

        Raises:
            ValueError: Shares that are not 0 <= start <= end < 1, or a model that was not wrapped.
        """
        if not 0 <= start <= end < 1:
            raise ValueError(f"start is {start} and end {end}: choose shares of the steps, 0 <= start <= end < 1")
        names = [site.name for site in sites(model)]
        whole = sum(GAPS[KINDS.index(name.partition(".")[0])] for name in names if name != KINDS[3])
        first = max(1.0, start * steps)  # at step 0 no norm has seen a batch
        unit = max(0.0, end * steps - first) / max(whole, 1)
        gaps = (GAPS[0] * unit, GAPS[1] * unit, GAPS[2] * unit)
        return replace(cls.of(names, first, gaps), taper=taper)

    @classmethod
    def at_once(cls, model: nn.Module, step: int, taper: int = 0) -> Schedule:
        """Everything from one step on; without a taper, the control.

        Args:
            model: A wrapped model.
            step: Of all removals.
            taper: Steps that each removal takes.

        Returns:
            The schedule.

        Raises:
            ValueError: The model was not wrapped.
        """
        return cls(tuple((step, site.name) for site in sites(model)), taper)

    def due(self, step: int) -> dict[str, float]:
        """Sites that are to be removed by the beginning of a step, and their shares, above 0 to 1.

        Args:
            step: Of the training, 0 being the first.

        Returns:
            Site -> share, as `hf_xent.ln_free.remove` takes it.
        """
        shares = {site: min(1.0, (step - at + 1) / (self.taper + 1)) for at, site in self.events}
        return {site: share for site, share in shares.items() if share > 0}

    def check(self, model: nn.Module, steps: int | None = None) -> None:
        """Refuse a schedule that does not fit.

        Args:
            model: A wrapped model.
            steps: Of the training; None does not look at them.

        Raises:
            ValueError: It removes what the model does not have, or has not ended after so many steps.
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
