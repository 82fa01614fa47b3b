"""HL-Gauss: regression as cross-entropy with a normal distribution around the label, as mass in bins.

    -sum_i p_i log softmax(z)_i   p_i = [erf((b_i+1 - y) / (sqrt2 sigma)) - erf((b_i - y) / (sqrt2 sigma))] / Z

The edges b_0..b_m are equally spaced, sigma is `sigma_ratio` times the width of a bin, and Z makes the sum of p one.
The prediction is the mean of the softmax over the centers of bins. A normal distribution that the ends of the support
cut off has another mean than its label, so the support is padded: it goes 3 sigma beyond `low` and `high`. As sigma
goes to 0, this is cross-entropy of the bin that has the label.

`low` and `high` have to be set: 'hl_gauss:low=0, high=5'. Labels beyond are taken for the nearer end.

Source: Farebrother et al. 2024, Stop Regressing: Training Value Functions via Classification for Scalable Deep RL,
arXiv:2403.03950; Imani and White 2018, arXiv:1806.04613.
Relations: TwoHot has mass in the two bins beside the label alone; SquaredError is the regression that both replace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .bins import Bins


@dataclass(frozen=True)
class HLGauss(Bins):
    """Cross-entropy with a normal distribution in bins; see the module's docstring.

    Raises:
        ValueError: As `Bins`, or there are too few bins for the padding.
    """

    sigma_ratio: float = 0.75
    """sigma in widths of a bin; 0.75 is the authors' recommendation."""
    padded: bool = True
    """Whether the support goes 3 sigma beyond `low` and `high`; if not, they are its outer edges."""
    ranges: ClassVar[dict[str, str]] = {"sigma_ratio": "(0, inf)"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.padded and self.bins <= 6 * self.sigma_ratio:
            raise ValueError(
                f"bins is {self.bins}: the padding alone takes 6 sigma_ratio, {6 * self.sigma_ratio:g}: choose"
                " more, or padded=False"
            )

    @property
    def grid(self) -> tuple[float, float]:
        """The center of the first bin, and the width of a bin."""
        low, high = self.range
        beyond = 3 * self.sigma_ratio if self.padded else 0.0  # in widths
        width = (high - low) / (self.bins - 2 * beyond)
        return low + (0.5 - beyond) * width, width

    def masses(self, position: Tensor, index: Tensor) -> Tensor:
        """The normal distribution's mass between the edges of a bin, of that within the support."""
        edges = torch.cat([index - 0.5, index[-1:] + 0.5])
        erf = ((edges - position) / (math.sqrt(2) * self.sigma_ratio)).erf()
        return erf.diff(dim=-1) / (erf[:, -1:] - erf[:, :1])

    def reference(self, logits: Any, labels: Any, **_: Any) -> np.ndarray:
        """-sum_i p_i log q_i, with p from the edges b_i in the units of labels."""
        low, high = self.range
        z, y = np.asarray(logits, np.float64), np.clip(np.asarray(labels, np.float64), low, high)
        if self.padded:  # width w: (high - low) + 6 sigma = bins w, sigma = ratio w
            sigma = self.sigma_ratio * (high - low) / (self.bins - 6 * self.sigma_ratio)
            low, high = low - 3 * sigma, high + 3 * sigma
        edges, sigma = np.linspace(low, high, self.bins + 1), self.sigma_ratio * (high - low) / self.bins
        normal = np.vectorize(math.erf, otypes=[float])((edges[None] - y[:, None]) / (np.sqrt(2) * sigma))
        p = (normal[:, 1:] - normal[:, :-1]) / (normal[:, -1:] - normal[:, :1])
        q = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        return -(p * np.log(q)).sum(1)
