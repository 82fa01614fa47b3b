"""Mixtures of voice and music, drawn anew for every example, and what a network learns from them.

    x = (v + g a) / √(1 + g²)      v, a: crops of the voice and the music, each from a random place; g: the music's gain
    masks                pixel_values = log |X|,        labels = 1 where |V| > |g A|
    autoencoder          pixel_values = log |M · X|,    targets = log |M · X|       M: that mask
    voice                pixel_values = log |X|,        targets = log |M · X|

Voice and music have a root mean square of 1 as a whole, so that mixtures have about 1, as `separate` gives it to what
it reads; crops may be louder or softer. The two kinds with targets are for pre-training: the authors' autoencoder of
the masked mixture, and one that has to find it in the mixture.

Source: Lin et al. 2018, arXiv:1812.01278. The authors rebuild magnitudes with sigmoids; here they are logarithms.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..options.ranges import check_count, is_number
from .masks import ideal_binary_mask
from .stft import STFT, features
from .waves import read_wav

KINDS = ("masks", "autoencoder", "voice")


def joined(files: Iterable[str | Path], rate: int) -> Tensor:
    """The waveforms of files one after the other [T], divided by their root mean square.

    Raises:
        ValueError: There are none, or one has another number of samples per second, or all are silent.
    """
    parts = []
    for file in files:
        samples, there = read_wav(file)
        if there != rate:
            raise ValueError(f"{file} has {there} samples a second, not {rate}: resample it")
        parts.append(samples)
    if not parts:
        raise ValueError("files is empty: give one or more")
    return leveled(torch.cat(parts))


def leveled(waveform: Tensor) -> Tensor:
    """A waveform [..., T] divided by its root mean square. Raises: ValueError if it is silent."""
    level = waveform.square().mean(-1, keepdim=True).sqrt()
    if not bool((level > 0).all()):
        raise ValueError("waveform is silent: it has no level")
    return waveform / level


@dataclass(frozen=True)
class Mixtures(Dataset[dict[str, Tensor]]):
    """Examples for a network of masks; the i-th is the same whenever it is read, and in every process.

    Args:
        voice: A waveform [T] with a root mean square of 1, such as `joined` makes.
        music: Another one.
        count: The number of examples.
        frames: The length of an example in frames.
        kind: 'masks', 'autoencoder' or 'voice', as the module says.
        stft: The transform.
        gain: The music's gain is drawn from -gain to gain, in decibels.
        seed: Of what is drawn.

    Raises:
        ValueError: A kind that is unknown, numbers out of range, or waveforms that are shorter than an example.
    """

    voice: Tensor
    music: Tensor
    count: int
    frames: int = 64
    kind: str = "masks"
    stft: STFT = field(default_factory=STFT)
    gain: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("count", self.count, 1)
        check_count("frames", self.frames, 2)
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}: choose one of {', '.join(KINDS)}")
        if not is_number(self.gain, "[0, inf)"):
            raise ValueError(f"gain is {self.gain!r}: choose a number of decibels, 0 or more")
        if short := [name for name in ("voice", "music") if len(getattr(self, name)) < self._length]:
            raise ValueError(f"{short[0]} is shorter than {self._length} samples, those of {self.frames} frames")

    @property
    def _length(self) -> int:
        return (self.frames - 1) * self.stft.hop

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """pixel_values [1, F, frames], and labels or targets [F, frames]."""
        if not -self.count <= index < self.count:
            raise IndexError(index)
        draw = torch.Generator().manual_seed(self.seed * 2_147_483_647 + index % self.count)
        voice, music = (self._crop(sound, draw) for sound in (self.voice, self.music))
        decibels = self.gain * (2 * torch.rand((), generator=draw) - 1)
        voice, music = self.stft.spectrum(voice), self.stft.spectrum(music * 10 ** (decibels / 20))
        mask, mixture = ideal_binary_mask(voice, music), (voice + music) / (1 + 10 ** (decibels / 10)).sqrt()
        seen, kept = features(mixture)[None], features(mask * mixture)
        if self.kind == "masks":
            return {"pixel_values": seen, "labels": mask.long()}
        return {"pixel_values": seen if self.kind == "voice" else kept[None], "targets": kept}

    def _crop(self, sound: Tensor, draw: torch.Generator) -> Tensor:
        start = int(torch.randint(len(sound) - self._length + 1, (), generator=draw))
        return sound[start : start + self._length]
