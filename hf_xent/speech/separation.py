"""A voice out of a mixture with music: a network gives a mask of the spectrogram, and the mixture its phase.

    X = STFT(x),   m = sigmoid(network(log |X| / rms(x)))
    voice = iSTFT(floored(m) · X),   accompaniment = iSTFT(floored(1 - m) · X)

With a floor of 0 both add up to the mixture; with another, what is below it is in neither. The level of a waveform does
not matter, as the network reads it divided by its root mean square.

Networks are any of `AutoModelForSemanticSegmentation` that read images of one channel and have one label (its sigmoid
is m) or two (the softmax of the second): `hf_xent.models.mask_net.MaskNet`, SegFormer and others.

Source: Lin et al. 2018, arXiv:1812.01278, for the mask with a floor and the mixture's phase.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.contexts import eval_mode
from ..options.ranges import check_count
from .masks import floored, hard, resized
from .stft import STFT, check_waveform, features

CONTEXT = 64
"""Frames that a chunk sees on each side beyond its own, for models that do not say how many matter."""


def separate(
    model: Any, waveform: Tensor, rate: int | None = None, *, floor: float = 0.0, binary: bool = False,
    chunk: int = 1024, stft: STFT | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Separate the voice of a mixture from its accompaniment.

    Args:
        model: A network of masks, as the module says; it is left in its mode.
        waveform: A mixture [T], or several of one length [B, T], on any device; an array is one on the CPU.
        rate: Its samples per second, which has to be that of the transform; None if it is known to be.
        floor: Shares of the mask below it become 0, likewise for the accompaniment; it is chosen on validation data.
        binary: Whether the mask is cut at 1/2 to zeros and ones, without a floor.
        chunk: How many frames the model reads at a time, with its context on both sides beside. What a `MaskNet` gives
            does not depend on it; a network with global attention sees no more than this.
        stft: The transform; None takes the one that the model's configuration names.

    Returns:
        The voice and the accompaniment, each with the shape, type and device of the waveform.

    Raises:
        ValueError: A waveform, rate or option out of range, or a model that is no network of masks.
    """
    stft = STFT.of(model.config) if stft is None else stft
    if rate is not None and rate != stft.rate:
        raise ValueError(f"rate is {rate}, but the model has learned from {stft.rate} samples a second: resample to it")
    waveform = torch.as_tensor(waveform)
    check_waveform(waveform)
    if waveform.ndim > 2:
        raise ValueError(f"waveform has shape {tuple(waveform.shape)}: give one [T], or several [B, T]")
    if binary and floor:
        raise ValueError(f"floor is {floor}, but a binary mask has no shares: leave floor or binary out")
    samples = waveform.reshape(-1, waveform.shape[-1])
    mask = voice_mask(model, samples, chunk=chunk, stft=stft)
    parts = apply_mask(mask, samples, floor=floor, binary=binary, stft=stft)
    voice, rest = (part.reshape(waveform.shape).to(waveform.dtype) for part in parts)
    return voice, rest


def voice_mask(model: Any, waveform: Tensor, *, chunk: int = 1024, stft: STFT | None = None) -> Tensor:
    """The share of the voice in each bin of mixtures.

    Args:
        model: As for `separate`.
        waveform: Mixtures [B, T].
        chunk: As for `separate`.
        stft: As for `separate`.

    Returns:
        Shares [B, F, frames] from 0 to 1, float32 or wider, on the waveform's device.

    Raises:
        ValueError: As `separate` does.
    """
    stft = STFT.of(model.config) if stft is None else stft
    check_count("chunk", chunk, 1)
    if waveform.ndim != 2:
        raise ValueError(f"waveform has shape {tuple(waveform.shape)}: give mixtures [B, T]")
    channels = getattr(model.config, "num_channels", 1)
    if channels != 1:
        raise ValueError(
            f"the model reads {channels} channels, a spectrogram has one: configure it with num_channels=1"
        )
    images = features(stft.spectrum(_scaled(waveform)[0]))[:, None]
    context, frames, parts = getattr(model.config, "context", CONTEXT), images.shape[-1], []
    with torch.no_grad(), eval_mode(model):
        for start in range(0, frames, chunk):
            stop, first = min(start + chunk, frames), max(0, start - context)
            part = _shares(model, images[..., first : stop + context])
            parts.append(part[..., start - first : stop - first])
    return torch.cat(parts, -1)


def apply_mask(
    mask: Tensor, waveform: Tensor, *, floor: float = 0.0, binary: bool = False, stft: STFT
) -> tuple[Tensor, Tensor]:
    """What a mask and its complement let through of mixtures.

    Args:
        mask: Shares [..., F, frames], or what broadcasts to it, such as a static mask [F, 1].
        waveform: Mixtures [..., T].
        floor: As for `separate`.
        binary: As for `separate`.
        stft: The transform.

    Returns:
        The voice and the accompaniment [..., T].

    Raises:
        ValueError: Values that are no shares, or that do not fit the spectrum.
    """
    spectrum = stft.spectrum(waveform)
    mask = mask.to(spectrum.real.dtype) if mask.dtype != torch.bool else mask.to(spectrum.real.dtype, copy=True)
    try:
        shape = torch.broadcast_shapes(mask.shape, spectrum.shape)
    except RuntimeError:
        shape = torch.Size()
    if shape != spectrum.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, the spectrum {tuple(spectrum.shape)}: give shares of it")
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError("mask has values outside of [0, 1]: give shares, such as the sigmoid of logits")
    voice, rest = (hard(mask), 1 - hard(mask)) if binary else (floored(mask, floor), floored(1 - mask, floor))
    length = waveform.shape[-1]
    return stft.waveform(voice * spectrum, length), stft.waveform(rest * spectrum, length)


def _scaled(waveform: Tensor) -> tuple[Tensor, Tensor]:
    """Waveforms [B, T] with a root mean square of 1, in float32 or wider; silent ones stay silent."""
    samples = waveform if waveform.itemsize >= 4 else waveform.float()
    level = samples.square().mean(-1, keepdim=True).sqrt()
    return samples / torch.where(level > 0, level, 1), level


def _shares(model: Any, images: Tensor) -> Tensor:
    """What the model says of images [B, 1, F, T]: shares [B, F, T], of float32 or wider, on the images' device."""
    parameter = next(model.parameters())
    logits = model(pixel_values=images.to(parameter.device, parameter.dtype)).logits
    if logits.ndim != 4 or logits.shape[1] not in (1, 2):
        raise ValueError(f"logits have shape {tuple(logits.shape)}: choose a model of images with one label or two")
    logits = resized(logits.float(), images.shape[-2:])
    difference = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
    return difference.sigmoid().to(images.device)
