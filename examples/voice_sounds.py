"""Voice and music for `voice_separation.py`: prompts and pieces that are trained on, and others that are not."""

import random
from typing import NamedTuple

import torch
from torch import Tensor

from hf_xent.data import asterisk
from hf_xent.speech import STFT, joined
from hf_xent.speech.mixtures import leveled

KNOWN = 0.85
"""The share of the pieces trained on that is for training; what is behind is the test 'known music'."""
Pair = tuple[Tensor, Tensor]


class Sounds(NamedTuple):
    """Waveforms with a root mean square of 1; voice and music of a pair have one length."""

    voice: Tensor
    music: Tensor
    valid: Pair
    tests: dict[str, Pair]


def pair(voice: Tensor, music: Tensor, longest: int) -> Pair:
    """The start of both, as long as both are, at most a number of samples."""
    length = min(len(voice), len(music), longest)
    return leveled(voice[:length]), leveled(music[:length])


def sounds(folder: str, stft: STFT, seconds: float) -> Sounds:
    """All parts; prompts are in an order drawn once: the first 70 % train, 10 % validate, and 20 % test."""
    files = {name: [row["file"] for row in asterisk.prompts(folder, name)] for name in ("en", "fr")}
    for names in files.values():
        random.Random(0).shuffle(names)
    a, b = (int(share * len(files["en"])) for share in (0.7, 0.8))
    train, valid, test = (joined(part, stft.rate) for part in (files["en"][:a], files["en"][a:b], files["en"][b:]))
    *trained, between, other = (joined([piece], stft.rate) for piece in asterisk.music(folder))
    starts = [piece[: int(KNOWN * len(piece))] for piece in trained]
    ends = [piece[int(KNOWN * len(piece)) :] for piece in trained]
    longest = int(seconds * stft.rate)
    tests = {
        "other music": pair(test, other, longest),
        "known music": pair(test, torch.cat(ends), longest),
        "French": pair(joined(files["fr"], stft.rate), other, longest),
    }
    return Sounds(train, leveled(torch.cat(starts)), pair(valid, between, longest), tests)
