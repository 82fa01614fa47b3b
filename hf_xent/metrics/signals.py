"""How much of a signal an estimate of it has, whatever its scale: the ratio of energies in decibels.

    a           <e, s> / <s, s>, the best scale of the signal s for the estimate e
    SI-SDR      10 log10(|a s|² / |e - a s|²)

A scaled copy has infinity, and s plus noise that is orthogonal to it has 10 log10(|s|² / |n|²). An estimate that is
orthogonal to the signal, silence included, has minus infinity.

Source: Le Roux, Wisdom, Erdogan, Hershey 2019, SDR - half-baked or well done?, arXiv:1811.02508.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

ROUNDING = 8 * np.finfo(np.float64).eps
"""A part of the amplitude that is what rounding leaves of zero."""


def si_sdr(signal: ArrayLike, estimate: ArrayLike, *, zero_mean: bool = True) -> np.ndarray:
    """The scale-invariant ratio of signal to distortion.

    Args:
        signal: The true waveform [..., T].
        estimate: What is compared with it [..., T].
        zero_mean: Whether the mean of both is subtracted before.

    Returns:
        Decibels [...] in float64.

    Raises:
        ValueError: Other shapes, samples that are not finite, or a signal that is silent.
    """
    s, e = (np.asarray(x, dtype=np.float64) for x in (signal, estimate))
    if s.shape != e.shape or not s.ndim or not s.shape[-1]:
        raise ValueError(f"estimate has the shape {e.shape} and signal {s.shape}: give both as [..., T], T >= 1")
    if not (np.isfinite(s).all() and np.isfinite(e).all()):
        raise ValueError("signal or estimate has samples that are nan or infinite: leave them out")
    loudness = (s * s).sum(-1, keepdims=True)
    if zero_mean:
        s, e = (x - x.mean(-1, keepdims=True) for x in (s, e))
    energy = (s * s).sum(-1, keepdims=True)
    if not (energy > ROUNDING**2 * loudness).all():  # what a constant leaves of itself is rounding
        raise ValueError("signal is silent, or constant: a ratio to it has no meaning")
    target = (s * e).sum(-1, keepdims=True) / energy * s
    kept, lost = ((x * x).sum(-1) for x in (target, e - target))
    whole = kept + lost
    kept, lost = (np.where(x <= ROUNDING**2 * whole, 0, x) for x in (kept, lost))
    with np.errstate(divide="ignore"):
        ratio = np.divide(kept, lost, out=np.full(kept.shape, np.inf), where=lost > 0)
        return np.where(kept > 0, 10 * np.log10(np.where(kept > 0, ratio, 1)), -np.inf)
