"""Waveforms from WAV files and into them, with the standard library and NumPy.

A sample of b bits is a whole number; a waveform has it divided by 2^(b-1), so that it is in [-1, 1).

Source: RIFF/WAVE, uncompressed PCM; samples of 8 bits have no sign there, and 128 is silence.
"""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def read_wav(path: str | Path) -> tuple[Tensor, int]:
    """Read a WAV file of uncompressed samples of 8, 16, 24 or 32 bits.

    Args:
        path: The file.

    Returns:
        The waveform [T], float32 in [-1, 1], the mean of its channels if there are several; and samples per second.

    Raises:
        ValueError: The file is no such WAV file, has no samples, or ends before its last one.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate, count = file.getparams()[:4]
            content = file.readframes(count)
    except (wave.Error, EOFError) as error:
        reason = str(error) or "it ends in its header"
        raise ValueError(f"cannot read {path}: {reason}; give a WAV file of uncompressed PCM samples") from error
    if width not in (1, 2, 3, 4):
        raise ValueError(f"{path} has samples of {8 * width} bits: give a WAV file of 8, 16, 24 or 32 bits")
    if not count or len(content) != count * channels * width:
        there = len(content) // (channels * width)
        raise ValueError(f"{path} has {there} of the {count} samples that its header names: give a complete file")
    samples = _numbers(content, width).reshape(count, channels).mean(1)
    return torch.from_numpy((samples / 2.0 ** (8 * width - 1)).astype(np.float32)), rate


def write_wav(path: str | Path, waveform: Any, rate: int) -> Path:
    """Write a waveform as a WAV file of one channel and 16 bits; folders are made.

    Args:
        path: The file.
        waveform: A tensor or array [T] in [-1, 1].
        rate: Samples per second.

    Returns:
        The path.

    Raises:
        ValueError: The waveform has another shape, or samples that are not in [-1, 1].
    """
    samples = torch.as_tensor(waveform).detach().cpu().double()
    if samples.ndim != 1 or not len(samples):
        raise ValueError(f"waveform has shape {tuple(samples.shape)}: give one waveform [T]")
    peak = float(samples.abs().max())
    if not peak <= 1:
        raise ValueError(f"waveform has samples up to {peak:.4g}: divide it by its peak, for values in [-1, 1]")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = (samples * 2**15).round().clamp(-(2**15), 2**15 - 1).numpy().astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(numbers.tobytes())
    return path


def _numbers(content: bytes, width: int) -> np.ndarray:
    """Samples as whole numbers, as float64, which has all numbers of 32 bits."""
    if width == 1:
        return np.frombuffer(content, np.uint8).astype(np.float64) - 128
    if width == 3:  # NumPy has no such type: the sign is that of the third byte
        low = np.frombuffer(content, np.uint8).reshape(-1, 3)
        return low[:, 0] + 256.0 * low[:, 1] + 65536.0 * low[:, 2].astype(np.int8)
    return np.frombuffer(content, f"<i{width}").astype(np.float64)
