"""Log-mel features of waveforms, and batches of utterances of different lengths.

    frame i      the samples from i · hop to i · hop + window, times a Hann window
    mel(f)       2595 log10(1 + f / 700); the triangles' corners are equally far apart in mel, from 0 to rate / 2
    features     log max(Σ_f triangle_b(f) |frame^(f)|², 1e-10)

A frame has the samples of its own utterance alone, and `standardized` uses valid frames alone: what a model
sees of an utterance does not depend on the batch it is in.

Source: Stevens, Volkmann, Newman 1937, for the mel; the formula of HTK (Young et al., The HTK Book).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..options.ranges import check_count
from .stft import check_waveform

FLOOR = 1e-10
"""The least energy of a band, before the logarithm."""


def log_mel(waveform: Tensor, rate: int, bins: int = 80, window: float = 0.025, hop: float = 0.010) -> Tensor:
    """Log-mel features of a waveform, or of a batch of waveforms of one length.

    Args:
        waveform: [T] or [B, T]; one that is shorter than a window is padded with zeros to one.
        rate: Samples per second.
        bins: The number of bands.
        window: The length of a frame, in seconds.
        hop: What lies between the starts of two frames, in seconds.

    Returns:
        [frames, bins] or [B, frames, bins] in the waveform's type, `frame_count` of them.

    Raises:
        ValueError: A waveform without samples, or with some that are not finite; or so many bands that one has no
            frequency of its own.
    """
    check_waveform(waveform)
    length, step = _samples(rate, window, hop)
    size = 2 ** (length - 1).bit_length()
    triangles = mel_filters(size // 2 + 1, bins, rate).to(waveform.device)
    samples = waveform.float()
    samples = torch.nn.functional.pad(samples, (0, max(0, length - samples.shape[-1])))
    frames = samples.unfold(-1, length, step) * torch.hann_window(length, device=waveform.device)
    energy = torch.fft.rfft(frames, size).abs().square()
    return (energy @ triangles).clamp(min=FLOOR).log().to(waveform.dtype)


def frame_count(samples: int, rate: int, window: float = 0.025, hop: float = 0.010) -> int:
    """The number of frames that `log_mel` makes of that many samples: one, and one more for each whole hop behind."""
    length, step = _samples(rate, window, hop)
    return 1 + max(0, samples - length) // step


def mel_filters(frequencies: int, bins: int, rate: int) -> Tensor:
    """Triangles [frequencies, bins] over the frequencies 0 to rate / 2, each 1 at its peak.

    Raises:
        ValueError: A triangle lies between two frequencies, so that its band would always be silent.
    """
    check_count("bins", bins, 1)
    top = 2595 * torch.log10(torch.tensor(1 + rate / 2 / 700, dtype=torch.float64))
    corners = 700 * (10 ** (torch.linspace(0, 1, bins + 2, dtype=torch.float64) * top / 2595) - 1)
    at = torch.linspace(0, rate / 2, frequencies, dtype=torch.float64)[:, None]
    low, peak, high = corners[:-2], corners[1:-1], corners[2:]
    triangles = torch.minimum((at - low) / (peak - low), (high - at) / (high - peak)).clamp(min=0)
    if not bool((triangles.sum(0) > 0).all()):
        raise ValueError(
            f"bins is {bins}, but of {frequencies} frequencies some bands have none: choose fewer, or a longer window"
        )
    return triangles.float()


def standardized(features: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Features with mean 0 and variance 1 in each band, over the valid frames of each utterance; padding becomes 0.

    Args:
        features: [T, F] or [B, T, F].
        lengths: The numbers [B] of valid frames, at least 1; None if all are.
    """
    batch = features if features.ndim == 3 else features[None]
    count = torch.full((len(batch),), batch.shape[1]) if lengths is None else lengths
    count = count.to(batch.device)[:, None, None]
    valid = torch.arange(batch.shape[1], device=batch.device)[None, :, None] < count
    centred = (batch - batch.masked_fill(~valid, 0).sum(1, keepdim=True) / count).masked_fill(~valid, 0)
    scale = (centred.square().sum(1, keepdim=True) / count).sqrt().clamp(min=1e-5)  # a band may be constant
    return (centred / scale).reshape(features.shape)


@dataclass(frozen=True)
class PadSpeech:
    """A collator of utterances: sound, its mask and sequences of ids, each padded to the longest of the batch.

    Of each example it takes `input_features` [T, F] or `input_values` [T], the name that the model reads, and the
    columns of ids named in `ids`; others are left out. It adds `attention_mask`, 1 for what is not padding.
    """

    ids: Mapping[str, int] = field(default_factory=lambda: {"labels": -100})
    """Column -> what it is padded with; a column that no example has is not made."""
    multiple: int = 1
    """Sound is padded to a multiple of this length."""

    def __post_init__(self) -> None:
        check_count("multiple", self.multiple, 1)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch.

        Raises:
            ValueError: There are no examples, or they lack a column that others have.
        """
        name = next((name for name in ("input_features", "input_values") if examples and name in examples[0]), None)
        if name is None:
            raise ValueError("examples have neither input_features nor input_values: give one of them in each")
        columns = [name, *(column for column in self.ids if any(column in example for example in examples))]
        for column in columns:
            if absent := [i for i, example in enumerate(examples) if column not in example]:
                raise ValueError(f"example {absent[0]} has no {column}, which others have: give it in each")
        sounds = [torch.as_tensor(example[name], dtype=torch.float32) for example in examples]
        if empty := [i for i, sound in enumerate(sounds) if not len(sound)]:
            raise ValueError(f"example {empty[0]} has {name} of length 0: leave it out")
        length = -(-max(map(len, sounds)) // self.multiple) * self.multiple
        batch: dict[str, Tensor] = {name: _padded(sounds, length, 0.0)}
        batch["attention_mask"] = _padded([torch.ones(len(sound), dtype=torch.long) for sound in sounds], length, 0)
        for column in columns[1:]:
            ids = [torch.as_tensor(example[column], dtype=torch.long) for example in examples]
            batch[column] = _padded(ids, max(map(len, ids)), self.ids[column])
        return batch


def _padded(sequences: list[Tensor], length: int, value: float) -> Tensor:
    batch = sequences[0].new_full((len(sequences), length, *sequences[0].shape[1:]), value)
    for row, sequence in zip(batch, sequences, strict=True):
        row[: len(sequence)] = sequence
    return batch


def _samples(rate: int, window: float, hop: float) -> tuple[int, int]:
    """A window and a hop in samples. Raises: ValueError for less than one."""
    length, step = round(window * rate), round(hop * rate)
    if length < 1 or step < 1:
        raise ValueError(f"window is {window} s and hop {hop} s, less than a sample at rate {rate}: choose longer ones")
    return length, step
