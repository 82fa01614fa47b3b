"""Unbiased samples of a language model, and the temperature at which it has a given entropy.

A model with lower entropy repeats itself more and errs less: compare models at equal entropy (`temperature_at`), or
state their entropies.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.anatomy import check_room
from ..models.padding import padded
from ..ops import Head, vocab_stats
from ..options.ranges import check_count, is_integer, is_number
from ..patching import patched
from .decoding import RUNNING, reduced

Tokens = Sequence[Sequence[int]]


@torch.no_grad()
def responses(
    model: Any, prompts: Tokens, *, tokens: int = 32, seed: int = 0, temperature: float = 1.0
) -> list[list[int]]:
    """Samples continuations of prompts from the model's full distribution.

    There is no truncation, penalty or assistance, whatever the model's generation configuration says. torch's
    generators are not changed.

    Args:
        model: A causal LM of transformers, patched or not.
        prompts: Token ids of each prompt, of any lengths.
        tokens: The maximum number of new tokens.
        seed: The seed of the samples, a whole number of 64 bits.
        temperature: Temperature of the softmax; 0 is greedy decoding.

    Returns:
        New token ids of each prompt, ending with an end token, or after `tokens` without one.

    Raises:
        ValueError: A negative temperature, tokens or a seed that is not a whole number, no prompts or an empty one, or
            more tokens than the model has positions for.
    """
    if not is_number(temperature, "[0, inf)"):
        raise ValueError(f"temperature is {temperature!r}: choose a positive number, or 0 for greedy decoding")
    check_count("tokens", tokens, 1)
    check_seed(seed)
    if not len(prompts) or not all(map(len, prompts)):
        raise ValueError(f"prompts has {len(prompts)} rows: pass at least one, and at least one token in each")
    length, pad = max(map(len, prompts)), model.generation_config.pad_token_id or 0
    check_room(model, length + tokens, f"length of prompts ({length}) and tokens ({tokens})")
    ids, mask = padded(prompts, pad, left=True, device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(), reduced(model.generation_config, RUNNING):
        torch.manual_seed(seed)
        sequences = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, pad_token_id=pad, **sampling)
    new, stop = sequences[:, length:].tolist(), ends(model)
    return until_end(new, stop)


def sample(
    model: Any, prompts: Tensor | Tokens, *, tokens: int = 32, seed: int = 0, temperature: float = 1.0
) -> list[list[int]]:
    """`responses` without their end tokens.

    Args:
        model: A causal LM of transformers, patched or not.
        prompts: Token ids [B, T], or those of each prompt, of any lengths.
        tokens: The maximum number of new tokens.
        seed: The seed of the samples, a whole number of 64 bits.
        temperature: Temperature of the softmax; 0 is greedy decoding.

    Returns:
        New token ids of each prompt.

    Raises:
        ValueError: As `responses`.
    """
    stop = ends(model)
    rows = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    new = responses(model, rows, tokens=tokens, seed=seed, temperature=temperature)
    return [row[:-1] if row and row[-1] in stop else row for row in new]


@torch.no_grad()
def temperature_of(hidden: Tensor, head: Head, labels: Tensor, entropy: float, *, steps: int = 24) -> float:
    """The temperature at which the mean entropy over tokens with a label is `entropy`, bisected in [0.05, 4].

    Args:
        hidden: Hidden states [..., D].
        head: The output head that is applied to them.
        labels: Token ids [...]; positions with -100 do not count.
        entropy: The entropy to reach, nats.
        steps: Number of steps of the bisection; each is one pass over the head.

    Returns:
        The temperature.

    Raises:
        ValueError: No temperature in [0.05, 4] has this entropy.
    """

    def mean(temperature: float) -> float:
        stats = vocab_stats(hidden, head.tempered(temperature), labels, outputs=("entropy",))
        return float(stats.entropy.sum() / stats.mask.sum())

    low, high = 0.05, 4.0
    if not mean(low) <= entropy <= mean(high):
        raise ValueError(
            f"entropy is {entropy}: choose one from {mean(low)} to {mean(high)}, the model's at temperatures {low} and"
            f" {high}"
        )
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < entropy else (low, middle)
    return (low + high) / 2


@torch.no_grad()
def temperature_at(model: Any, ids: Tensor, entropy: float) -> float:
    """`temperature_of` a causal LM that predicts every token but the first; the model is not changed.

    Args:
        model: A causal LM of transformers, patched or not.
        ids: Token ids [B, T].
        entropy: The entropy to reach, nats.

    Returns:
        The temperature.

    Raises:
        ValueError: No temperature in [0.05, 4] has this entropy.
    """
    with patched(model, always=True):
        logits = model(input_ids=ids).logits[:, :-1]
    return logits.with_head(lambda hidden, head: temperature_of(hidden, head, ids[:, 1:], entropy))


def check_seed(seed: Any) -> None:
    """Refuse what torch's generators cannot be seeded with. Raises: ValueError."""
    if not is_integer(seed) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed!r}: choose a whole number of 64 bits")


def until_end(rows: list[list[int]], stop: Container[int | None]) -> list[list[int]]:
    """Each row up to and with its first end token, or all of it."""
    return [row[: next((i + 1 for i, token in enumerate(row) if token in stop), len(row))] for row in rows]


def ends(model: Any) -> set[int | None]:
    """The tokens that end a sequence."""
    ids = model.generation_config.eos_token_id
    return set(ids if isinstance(ids, list) else [ids])
