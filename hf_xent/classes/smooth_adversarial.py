"""Smooth adversarial comp-sum loss: comp-sum of a row, and how far its margins move when its input is moved.

    Phi^tau(sum_{y'!=y} exp(-D_y'(x) / rho)) + nu sup_{|x'-x|<=radius} |D(x') - D(x)|_2     D_y'(x) = z_y(x) - z_y'(x)

Phi^tau(u) is log(1 + u) for tau = 1 and ((1 + u)^(1 - tau) - 1) / (1 - tau) else, so that the first term is `comp_sum`
of the logits divided by rho. The supremum is searched for by the trainer, as `hf_xent.robust.ascend` does it: by steps
along the gradient from a random point of the ball, since the norm has no gradient at x itself. The loss is then
differentiable through z(x') and z(x).

What it bounds: with n classes and nu >= sqrt(n - 1) / rho it is at least the adversarial margin loss

    sup_{|x'-x|<=radius} Phi^tau(sum_{y'!=y} clip(1 - D_y'(x') / rho, 0, 1))

since the clipped line is below the exponential and has the slope 1 / rho, Phi^tau has a slope of at most 1, and a sum
of n - 1 numbers is at most sqrt(n - 1) times their length. A smaller nu, such as the default, is a regulariser and no
bound; and since a search finds a lower bound of the supremum, no value that is measured is a certificate.

With distance='kl' the second term is KL(q(x) | q(x')) of the two softmaxes, which needs no label: for tau = 1 and
rho = 1 this is TRADES, with nu for its 1 / lambda.

rho, nu, the number of steps and their size are this library's choices. `radius` has to be set for training, in the
units of `hf_xent.robust.inputs`: for pixels from 0 to 1, 8/255 = 0.0314 is a common choice for photographs.

Source: Mao, Mohri, Zhong 2023, Cross-Entropy Loss Functions: Theoretical Analysis and Applications, arXiv:2304.07288;
Zhang et al. 2019, Theoretically Principled Trade-off between Robustness and Accuracy, arXiv:1901.08573, for 'kl'.
Relations: nu = 0 is `comp_sum` of z / rho, which needs no search, and so is a radius that goes to 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..losses.comp_sum import CompSum
from ..options.ranges import check_count, check_number
from .base import ClassLoss

DISTANCES = ("margin", "kl")
NORMS = ("inf", "2")
TINY = 1e-12  # under the root, whose slope is then finite where nothing has moved


@dataclass(frozen=True)
class SmoothAdversarial(ClassLoss):
    """Comp-sum, and the largest change of the margins within a ball; see the module's docstring.

    Raises:
        ValueError: An option is out of its range or is none of its names.
    """

    tau: float = 1.0
    """That of `comp_sum`: 1 is cross-entropy."""
    rho: float = 1.0
    """The margin; logits are divided by it in the first term."""
    nu: float = 1.0
    """The weight of the change; a bound from sqrt(n - 1) / rho on, with n classes."""
    distance: str = "margin"
    """What a change is measured by: 'margin', the length of the change of all margins, or 'kl', as in TRADES."""
    radius: float | None = None
    """How far an input may be moved; it has to be set for training."""
    norm: str = "inf"
    """'inf', by which every number may be moved that far, or '2', the length of the whole move."""
    steps: int = 10
    """The steps of the search; each is a forward and a backward pass."""
    step: float = 0.25
    """The size of a step, as a share of the radius."""
    needs: ClassVar[tuple[str, ...]] = ("perturbed",)
    ranges: ClassVar[dict[str, str]] = {"rho": "(0, inf)", "nu": "[0, inf)", "step": "(0, inf)"}

    def __post_init__(self) -> None:
        super().__post_init__()
        CompSum(self.tau)  # which checks it
        object.__setattr__(self, "norm", str(self.norm))  # 2 and inf are numbers where options are text
        check_count("steps", self.steps, 1)
        if self.radius is not None:
            check_number(self, "radius", "(0, inf)")
        for name, names in (("distance", DISTANCES), ("norm", NORMS)):
            if getattr(self, name) not in names:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose {' or '.join(names)}")

    def __call__(self, logits: Tensor, labels: Tensor, perturbed: Tensor | None = None, **_: Any) -> Tensor:
        """The loss [N] of logits [N, K], labels [N] and the logits [N, K] of the inputs that were moved.

        Raises:
            ValueError: There are no logits of moved inputs.
        """
        if perturbed is None:
            raise ValueError("perturbed is None: give the logits of the same rows at inputs that were moved")
        loss = CompSum(self.tau).on_logits(logits / self.rho, labels, reduction="none")
        return loss + self.nu * self.gap(perturbed, logits, labels) if self.nu else loss

    def gap(self, perturbed: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """How far moved logits [N, K] are from logits [N, K] of labels [N]: [N], which a search increases."""
        if self.distance == "kl":
            log_q, log_moved = logits.log_softmax(-1), perturbed.log_softmax(-1)
            return (log_q.exp() * (log_q - log_moved)).sum(-1)
        change = perturbed - logits
        margins = change.gather(-1, labels[:, None]) - change  # 0 at the label
        return (margins.square().sum(-1) + TINY).sqrt()

    def reference(self, logits: Any, labels: Any, perturbed: Any = None, **_: Any) -> np.ndarray:
        """The formula, with the margins of the other classes one by one."""
        found = []
        for z, moved, y in zip(*(np.asarray(x, np.float64) for x in (logits, perturbed)), labels, strict=True):
            others = [k for k in range(len(z)) if k != y]
            margins, after = (np.array([row[y] - row[k] for k in others]) for row in (z, moved))
            u = np.exp(-margins / self.rho).sum()
            first = np.log1p(u) if self.tau == 1 else ((1 + u) ** (1 - self.tau) - 1) / (1 - self.tau)
            if self.distance == "kl":
                q, r = (np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in (z, moved))
                found.append(first + self.nu * (q * np.log(q / r)).sum())
            else:
                found.append(first + self.nu * np.sqrt(((after - margins) ** 2).sum()))
        return np.asarray(found)
