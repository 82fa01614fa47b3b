"""Pictures of a separation: spectrograms and masks, one above the other over the same seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..system.figures import panels as figure_of
from ..system.figures import save
from .stft import STFT

DYNAMICS = 60
"""The range of a spectrogram's colours in decibels, from the loudest bin of all downwards."""


def spectrograms(path: str | Path, parts: Mapping[str, Tensor], stft: STFT, seconds: float | None = None) -> Path:
    """Draw waveforms as spectrograms, and masks as they are.

    Args:
        path: The file, a PNG.
        parts: Title -> a waveform [T], or a mask [F, frames] of the same time with shares from 0 to 1. Spectrograms
            have one scale, in decibels.
        stft: The transform.
        seconds: How much is drawn, from the start; None for all.

    Returns:
        The path.

    Raises:
        ValueError: There is nothing to draw, or a part has another shape.
    """
    wrong = [title for title, x in parts.items() if x.ndim != 1 and (x.ndim != 2 or len(x) != stft.frequencies)]
    if wrong or not parts:
        raise ValueError(
            f"parts has {wrong[0] if wrong else 'nothing'}: give waveforms [T] or masks [{stft.frequencies}, frames]"
        )
    images = {title: part if part.ndim == 2 else _decibels(part, stft) for title, part in parts.items()}
    frames = None if seconds is None else 1 + round(seconds * stft.rate / stft.hop)
    loudest = max((float(images[title].max()) for title, part in parts.items() if part.ndim == 1), default=0.0)
    figure, _ = figure_of(1, 9, 1.9 * len(parts))
    figure.clear()
    axes = figure.subplots(len(parts), 1, squeeze=False, sharex=True)[:, 0]
    for axis, (title, part) in zip(axes, parts.items(), strict=True):
        image = images[title][:, :frames].detach().cpu().float().numpy()
        end = (image.shape[1] - 1) * stft.hop / stft.rate
        sound = part.ndim == 1
        limits = {"vmin": loudest - DYNAMICS, "vmax": loudest, "cmap": "magma"} if sound else {"vmin": 0, "vmax": 1}
        drawn = axis.imshow(
            image, origin="lower", aspect="auto", extent=(0, max(end, 1e-3), 0, stft.rate / 2000), **limits
        )
        figure.colorbar(drawn, ax=axis, label="dB" if sound else "share", pad=0.01)
        axis.set(title=title, ylabel="kHz")
    axes[-1].set_xlabel("seconds")
    return save(figure, Path(path))


def _decibels(waveform: Tensor, stft: STFT) -> Tensor:
    return 20 * stft.spectrum(waveform.detach().float()).abs().clamp(min=1e-6).log10()
