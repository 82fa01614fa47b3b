"""The loss of an encoder-decoder model against the sizes of its two halves.

    L = alpha (encoder_unit / Ne)^pe (decoder_unit / Nd)^pd + floor        Ne, Nd parameters of encoder and decoder

The best share of the encoder in a fixed sum of both is pe / (pe + pd), whatever the sum.

Source: Ghorbani et al. 2021, Scaling Laws for Neural Machine Translation, arXiv:2109.07740.
Relations: along a fixed share of the encoder it is a PowerLaw with the exponent pe + pd. Translations from original
    source text and back into original target text scale differently: fit each half of a test set on its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import nan
from typing import ClassVar

import numpy as np

from ..options.ranges import check_number
from .base import COEFFICIENT, EXPONENT, Bounds, Counts, Features, Law, Starts


@dataclass(frozen=True)
class EncoderDecoder(Law):
    """`alpha (encoder_unit / encoder)^pe (decoder_unit / decoder)^pd + floor`, nats per token.

    Raises:
        ValueError: A field is out of its range.
    """

    alpha: float = nan
    """The reducible loss of a model of one unit each, nats."""
    pe: float = nan
    """The exponent of the encoder."""
    pd: float = nan
    """The exponent of the decoder."""
    floor: float = nan
    """The loss in the limit, nats."""
    encoder_unit: float = field(default=1e6, kw_only=True)
    """The unit of the encoder's parameters; only alpha depends on it, and a fit does not change it."""
    decoder_unit: float = field(default=1e6, kw_only=True)
    """The unit of the decoder's parameters."""

    columns = ("encoder", "decoder")
    bounds: ClassVar[Bounds] = {"alpha": COEFFICIENT, "pe": EXPONENT, "pd": EXPONENT, "floor": COEFFICIENT}
    starts: ClassVar[Starts] = {"pe": (0.05, 0.1, 0.2, 0.4, 0.8), "pd": (0.05, 0.1, 0.2, 0.4, 0.8)}
    linear = ("alpha", "floor")
    distinct: ClassVar[Counts] = {"encoder": 3, "decoder": 3}

    def __post_init__(self) -> None:
        check_number(self, "encoder_unit", "(0, inf)")
        check_number(self, "decoder_unit", "(0, inf)")
        super().__post_init__()

    @property
    def encoder_share(self) -> float:
        """The share of all parameters that the encoder has in the best split: pe / (pe + pd)."""
        return self.pe / (self.pe + self.pd)

    def of(self, features: Features) -> np.ndarray:
        """The formula on `encoder` and `decoder`, numbers of parameters."""
        encoder, decoder = features["encoder"] / self.encoder_unit, features["decoder"] / self.decoder_unit
        return self.alpha * encoder**-self.pe * decoder**-self.pd + self.floor

    def describe(self) -> str:
        """The formula with its numbers, in one line."""
        return (
            f"L = {self.alpha:.5g} ({self.encoder_unit:g} / encoder)^{self.pe:.4g} "
            f"({self.decoder_unit:g} / decoder)^{self.pd:.4g} + {self.floor:.5g}"
        )
