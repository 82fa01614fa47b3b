"""Masks of spectrograms: which bins of a mixture belong to the voice, and to what share.

    ideal binary mask     1 where |V| > |A|, with V the spectrum of the voice and A that of the accompaniment
    softened              1 - s where it is 1, s where it is 0; s = .02 in the paper: cross-entropy never reaches 0
    floored               m where m >= θ, else 0: a soft mask without what is unlikely to be voice
    hard                  1 where m >= 1/2, else 0

Controls without a network, learned from the masks of the training set: `static_mask`, the mean of each frequency, and
`majority`, the more frequent class. The ideal mask itself is the bound of any binary mask.

Source: Lin et al. 2018, arXiv:1812.01278; the authors' code adds up thresholds over a sweep of θ, which this does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..options.ranges import is_number


def ideal_binary_mask(voice: Tensor, accompaniment: Tensor) -> Tensor:
    """Where the voice is louder than the accompaniment.

    Args:
        voice: Its spectrum or magnitudes [..., F, T].
        accompaniment: The same of the rest of the mixture.

    Returns:
        Booleans [..., F, T]; bins where both are equal, such as silence, are not voice.

    Raises:
        ValueError: The shapes differ.
    """
    if voice.shape != accompaniment.shape:
        raise ValueError(
            f"accompaniment has shape {tuple(accompaniment.shape)} and voice {tuple(voice.shape)}: give both alike"
        )
    return voice.abs() > accompaniment.abs()


def softened(mask: Tensor, smoothing: float = 0.02) -> Tensor:
    """Targets of a binary mask that are not quite 0 and 1.

    The same as label smoothing of two classes by twice as much: 'cross_entropy:label_smoothing=0.04' in `ClassTrainer`.

    Args:
        mask: Booleans, or zeros and ones.
        smoothing: What is taken from 1 and added to 0, from 0 to below 1/2.

    Returns:
        Floats of the mask's shape.
    """
    if not is_number(smoothing, "[0, 0.5)"):
        raise ValueError(f"smoothing is {smoothing!r}: choose a number in [0, 0.5)")
    return mask.float() * (1 - 2 * smoothing) + smoothing


def floored(mask: Tensor, floor: float) -> Tensor:
    """A soft mask in which shares below a floor are 0.

    Args:
        mask: Shares from 0 to 1.
        floor: The least share that is kept, from 0, which keeps all, to 1.

    Returns:
        Shares of the mask's shape.
    """
    if not is_number(floor, "[0, 1]"):
        raise ValueError(f"floor is {floor!r}: choose a number in [0, 1]")
    return mask.masked_fill(mask < floor, 0)


def hard(mask: Tensor) -> Tensor:
    """Zeros and ones, in the mask's type: 1 from one half on."""
    return (mask >= 0.5).to(mask.dtype)


def static_mask(masks: Tensor) -> Tensor:
    """The mean of each frequency over all frames of the training masks, as a mask [F, 1] for any number of frames.

    Args:
        masks: Binary masks [..., F, T].
    """
    return masks.float().movedim(-2, 0).flatten(1).mean(1, keepdim=True)


def majority(masks: Tensor) -> int:
    """The class, 0 or 1, that more bins of the training masks have; its share is the accuracy to exceed."""
    return int(masks.float().mean() > 0.5)


def accuracy(mask: Tensor, ideal: Tensor) -> float:
    """The share of bins in which the hard mask is the ideal one."""
    return float(((mask >= 0.5) == ideal.bool()).double().mean()) if mask.numel() else float("nan")


def resized(mask: Tensor, size: torch.Size) -> Tensor:
    """Masks or logits [B, C, h, w] at the size of a spectrogram, interpolated as SegFormer's are."""
    if mask.shape[-2:] == size:
        return mask
    return torch.nn.functional.interpolate(mask, size=size, mode="bilinear", align_corners=False)
