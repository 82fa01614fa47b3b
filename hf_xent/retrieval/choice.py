"""The fastest way to read candidates that gives a model's own numbers, found by trying."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from .inputs import Encoder
from .reading import WAYS, Inputs, Reader, Unreadable
from .trees import Tokens

SAMPLE = 6
"""How many candidates are scored in every way."""


def chosen_way(encoder: Encoder, candidates: Sequence[Tokens], sources: Sequence[Inputs]) -> str:
    """The first of `WAYS` that agrees with reading each candidate alone, tried on the longest source.

    They agree if the mean losses of a token differ by at most the square root of the dtype's epsilon (3e-4 nats in
    float32, 0.09 in bfloat16): ways that round differently do, and a mask or position that is not respected does not.

    Args:
        encoder: The model.
        candidates: All candidates; the longest one is tried, and some neighbours, which share tokens.
        sources: All sources.
    """
    source = max(sources, key=lambda inputs: inputs["input_ids"].shape[1] if "input_ids" in inputs else 0)
    sample = _sample(candidates)
    expected = Reader(encoder, sample, "alone")(source)
    tokens = torch.tensor([len(candidate) for candidate in sample])
    tolerance = torch.finfo(encoder.model.dtype).eps ** 0.5
    for way in WAYS[:-1]:
        try:
            found = Reader(encoder, sample, way)(source)
        except (Unreadable, ValueError, TypeError, RuntimeError, IndexError, AttributeError, NotImplementedError):
            continue  # models refuse a mask of four dimensions, or keys and values, by errors of any of these kinds
        if bool(((found - expected).abs() <= tolerance * tokens).all()):
            return way
    warnings.warn(
        "this model continues no keys and values exactly, so every pair is read alone, which is slow", stacklevel=2
    )
    return WAYS[-1]


def _sample(candidates: Sequence[Tokens]) -> list[Tokens]:
    """The longest candidate, and neighbours in alphabetical order, evenly from the whole."""
    ordered = sorted(candidates)
    longest = max(range(len(ordered)), key=lambda i: len(ordered[i]))
    step = max(1, 2 * len(ordered) // SAMPLE)
    places = {longest, *(i + k for i in range(0, len(ordered), step) for k in (0, 1))}
    return [ordered[i] for i in sorted(places) if i < len(ordered)]
