"""The short-time Fourier transform and its inverse, for waveforms of any length.

    X[f, t]      1/√(Σ w²) Σ_n w[n] x[n + t · hop - window/2] e^(-2πi f n / window)       w: a periodic Hann window
    inverse      the frames' overlap, each times w again, over the sum of w²: the identity, up to rounding
    features     log max(|X|, 0.001), in nats; with this norm, white noise of variance 1 has a mean |X|² of 1

Waveforms are padded with zeros, half a window before and behind, and behind to a whole number of hops: there are
1 + ceil(T / hop) frames, the first and last of which have their centres at or beyond the ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..options.ranges import check_count

QUIET = 1e-3
"""The least magnitude before the logarithm: 60 dB below white noise of variance 1."""


@dataclass(frozen=True)
class STFT:
    """A transform with a window and a hop in samples, of waveforms with a number of samples per second.

    Args:
        window: The length of the window in samples, an even number; there are window // 2 + 1 frequencies.
        hop: What lies between two frames, at most half a window.
        rate: Samples per second.

    Raises:
        ValueError: A number out of range.
    """

    window: int = 256
    hop: int = 64
    rate: int = 8000

    def __post_init__(self) -> None:
        check_count("window", self.window, 2)
        if self.window % 2:
            raise ValueError(f"window is {self.window}: choose an even number of samples")
        check_count("hop", self.hop, 1)
        check_count("rate", self.rate, 1)
        if self.hop > self.window // 2:
            raise ValueError(f"hop is {self.hop}: choose at most half of the window, {self.window // 2}")

    @classmethod
    def of(cls, config: Any) -> STFT:
        """The transform that a model's configuration names by window_length, hop_length and sampling_rate.

        Raises:
            ValueError: It names none.
        """
        names = ("window_length", "hop_length", "sampling_rate")
        values: list[Any] = [getattr(config, name, None) for name in names]
        if None in values:
            raise ValueError(f"the model's configuration has no {names[values.index(None)]}: pass stft")
        return cls(*values)

    @property
    def frequencies(self) -> int:
        """The number F of frequencies, from 0 to half the rate."""
        return self.window // 2 + 1

    def spectrum(self, waveform: Tensor) -> Tensor:
        """The complex spectrum [..., F, frames] of waveforms [..., T]; of float32, if their type is smaller.

        Raises:
            ValueError: A waveform is empty or not finite.
        """
        check_waveform(waveform)
        samples = waveform if waveform.itemsize >= 4 else waveform.float()
        weights = self._weights(samples)
        rows = F.pad(samples.reshape(-1, samples.shape[-1]), (0, -samples.shape[-1] % self.hop))
        spectra = torch.stft(
            rows, self.window, self.hop, window=weights, center=True, pad_mode="constant", return_complex=True
        )
        return spectra.reshape(*waveform.shape[:-1], *spectra.shape[-2:]) / weights.square().sum().sqrt()

    def waveform(self, spectrum: Tensor, length: int) -> Tensor:
        """The waveforms [..., length] of complex spectra [..., F, frames]."""
        frames = 1 + -(-length // self.hop)
        if spectrum.shape[-2:] != (self.frequencies, frames):
            raise ValueError(
                f"spectrum has shape {tuple(spectrum.shape)}: {length} samples have [{self.frequencies}, {frames}]"
            )
        weights = self._weights(spectrum.real)
        rows = spectrum.reshape(-1, *spectrum.shape[-2:]) * weights.square().sum().sqrt()
        whole = (frames - 1) * self.hop
        rows = torch.istft(rows, self.window, self.hop, window=weights, center=True, length=whole)
        return rows[:, :length].reshape(*spectrum.shape[:-2], length)

    def _weights(self, like: Tensor) -> Tensor:
        return torch.hann_window(self.window, dtype=like.dtype, device=like.device)


def features(spectrum: Tensor) -> Tensor:
    """Log-magnitudes of a spectrum, in nats: what networks see, and what they rebuild in pre-training."""
    return spectrum.abs().clamp(min=QUIET).log()


def check_waveform(waveform: Tensor) -> None:
    """Refuse what is no waveform [..., T]. Raises: ValueError."""
    if not waveform.is_floating_point() or not waveform.ndim or not waveform.shape[-1]:
        raise ValueError(
            f"waveform has shape {tuple(waveform.shape)} and type {waveform.dtype}: give floats, [T] or [B, T], T >= 1"
        )
    if not bool(waveform.isfinite().all()):
        raise ValueError("waveform has samples that are nan or infinite: leave them out")
