"""EMO: the earth mover's distance from the prediction to the label over embedding cosines, mixed with cross-entropy.

    loss = 1/2 (nll + sg[nll / d] d)          d = 1 - sum_i p_i cos(E_i, E_y)

That is emo1, whose value is the nll; emo2 is sg[d / nll] nll + d (value 2 d); emo is d alone. d is exact, since all
mass moves to one label. E carries no gradient; its zero rows have cosine 0. In the ratios d is at least 1/256 of the
mass off the label and nll at least 1e-6: below that, rounding would dominate.

Source: Ren, Wu, Zhu 2024, arXiv:2310.04691; the variants as in the authors' code, github.com/DRSY/EMO.
Statistics: payload; lse and target too, except for variant 'emo' without gt_detach.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from ..ops import Head, Payload, Stats
from ..ops.panels import Matrix, Panels, UnitRows
from ..ops.statistics import wide
from ..options.ranges import check_flag, is_number
from .base import Loss, select_valid


@dataclass(frozen=True, eq=False)
class EMO(Loss):
    """`1/2 (nll + sg[nll / d] d)` per token, d the expected cosine distance between predicted token and label.

    Raises:
        ValueError: A field is out of its range, the cost is not a matrix, or `ratio_clamp` is given with another
            variant than emo1.
    """

    variant: str = "emo1"
    """'emo1' has the value of cross-entropy, 'emo2' that of twice the distance, 'emo' is the distance alone."""
    cost: str | Matrix = "frozen"
    """E: 'frozen' (the head's weight when `bind` is called), 'current' (at every step) or a tensor [V, any width]."""
    gt_detach: bool = False
    """Add sg[p_y] to d, which changes its value but not its gradient: in emo2 confident tokens keep a gradient then."""
    ratio_clamp: float | None = None
    """Upper bound of emo1's ratio (the authors' package: 3.0); where it applies, the value is below the nll."""

    def __post_init__(self) -> None:
        if self.variant not in ("emo1", "emo2", "emo"):
            raise ValueError(f"variant is {self.variant!r}: choose 'emo1', 'emo2' or 'emo'")
        check_flag(self, "gt_detach")
        clamp = self.ratio_clamp
        if clamp is not None and not (self.variant == "emo1" and is_number(clamp, "(0, inf]")):
            raise ValueError(f"ratio_clamp is {clamp!r} in {self.variant}: pass a number > 0, to emo1 only")
        if isinstance(self.cost, Tensor) and self.cost.ndim == 2:  # a copy with rows of length 1, 0 for zero rows
            rows = self.cost.detach().to(wide(self.cost.dtype))
            object.__setattr__(self, "cost", normalize(rows, dim=-1).to(self.cost.dtype))
        elif isinstance(self.cost, Panels):
            object.__setattr__(self, "cost", Panels.of(UnitRows(self.cost)))
        elif isinstance(self.cost, Tensor) or self.cost not in ("frozen", "current"):
            raise ValueError(f"cost is {self.cost!r}: choose 'frozen', 'current' or a [V, H] tensor of embeddings")

    def __repr__(self) -> str:
        cost = repr(self.cost) if isinstance(self.cost, str) else f"<{len(self.cost)} embeddings>"
        others = ((name, getattr(self, name)) for name in ("variant", "gt_detach", "ratio_clamp"))
        return f"EMO(cost={cost}, {', '.join(f'{name}={value!r}' for name, value in others)})"

    @property
    def uses(self) -> tuple[str, ...]:  # type: ignore[override]  # a constant in the base, here it depends on fields
        """The statistics that it differentiates."""
        return ("payload",) if self.variant == "emo" and not self.gt_detach else ("lse", "target", "payload")

    def bind(self, weight: Matrix) -> EMO:
        """For cost='frozen', a copy with the unit rows of this weight as its cost; else itself.

        Raises:
            ValueError: The cost has another number of rows than the weight.
        """
        if isinstance(self.cost, Tensor) and len(self.cost) != len(weight):
            raise ValueError(
                f"cost has {len(self.cost)} rows but the head {len(weight)} tokens: pass one row per token"
            )
        return replace(self, cost=weight) if isinstance(self.cost, str) and self.cost == "frozen" else self

    def second(self, head: Head, labels: Tensor, teacher: Payload | None) -> Payload:
        """The label's unit embedding, and all unit embeddings as a head, whose logits are the cosines."""
        if isinstance(self.cost, str) and self.cost == "frozen":
            raise ValueError("cost is 'frozen' but no weight is bound: use loss.bind(head.weight), or cost='current'")
        if isinstance(self.cost, str):
            return replace(self, cost=head.weight).second(head, labels, teacher)
        if len(self.cost) != head.size:
            raise ValueError(f"cost has {len(self.cost)} rows but the head {head.size} tokens: pass one row per token")
        # the model moved after `bind`: the cost follows once
        if isinstance(self.cost, Tensor) and self.cost.device != head.weight.device:
            object.__setattr__(self, "cost", self.cost.to(head.weight.device))
        return self.cost[labels.clamp(0, head.size - 1)], Head(self.cost)

    def of_logits(self, logits: Tensor, stats: Stats) -> Tensor:
        """The losses from the cosines of all classes with each label; the cost has to be a tensor, or bound to one."""
        if isinstance(self.cost, str):
            raise ValueError(
                f"cost is {self.cost!r}, but logits come without a head's embeddings: pass a [C, H] tensor of the"
                " classes' embeddings"
            )
        if len(self.cost) != logits.shape[-1]:
            raise ValueError(
                f"cost has {len(self.cost)} rows but there are {logits.shape[-1]} classes: pass one row each"
            )
        rows, dtype = select_valid(stats), stats.lse.dtype
        cost = self.cost if isinstance(self.cost, Tensor) else self.cost.rows(slice(None))
        units = cost.to(logits.device, dtype)
        rows.values["payload"] = (logits[stats.mask].to(dtype).softmax(-1) * (units[rows.labels] @ units.T)).sum(-1)
        return self.of(rows)

    def of(self, stats: Stats) -> Tensor:
        """Per-token loss [N]."""
        d = 1 - stats.payload + (stats.logp.detach().exp() if self.gt_detach else 0)
        if self.variant == "emo":
            return d
        nll, bounded_d = stats.nll, torch.maximum(d, -torch.expm1(stats.logp) / 256).detach()
        if self.variant == "emo2":
            return bounded_d / nll.detach().clamp(min=1e-6) * nll + d
        return 0.5 * (nll + (nll.detach() / bounded_d.clamp(min=1e-30)).clamp(max=self.ratio_clamp or torch.inf) * d)

    def reference(self, logits: Tensor, labels: Tensor, **second: Tensor) -> Tensor:
        """Dense p and cosines; `weight` stands in for a cost that is not a tensor."""
        cost = self.cost if isinstance(self.cost, Tensor) else second["weight"].detach()
        units = normalize(cost.to(logits.dtype), dim=-1)
        p, mle = logits.softmax(-1), -logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
        moved = p - (p * one_hot(labels, len(units))).detach() if self.gt_detach else p
        emo = 1 - ((moved @ units) * units[labels]).sum(-1)
        emo1 = 0.5 * (mle + (mle / (emo + 1e-10)).detach().clamp(max=self.ratio_clamp or torch.inf) * emo)
        return {"emo1": emo1, "emo2": (emo / (mle + 1e-10)).detach() * mle + emo, "emo": emo}[self.variant]
