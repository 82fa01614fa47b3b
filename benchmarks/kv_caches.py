"""What a cache of keys and values takes, by its bits: bytes, memory of the process, and time of a token.

Bytes are those of the cache's tensors. For memory every cache has a process of its own, in which the model reads real
text in pieces: `resident` is how much more memory the process holds afterwards than before, `peak` the most it held
meanwhile, with the activations of a piece, over that. For time, in CPU seconds, all caches of one context are in one
process and take turns token by token, each reading the same text, so other load on the machine slows all alike. A round
is as many tokens as a block has, so that blocks age once in each; ratios are to the dense cache, medians over tokens
and over rounds.
"""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache

from hf_xent import data
from hf_xent.bench.memory import PeakMemory, return_large_blocks
from hf_xent.caches import StaircaseCache
from hf_xent.generation.prefixes import cache_name
from hf_xent.models import loading
from hf_xent.system.machine import cpu_name
from hf_xent.system.processes import Worker

FILE = Path("benchmarks/results/kv-caches.md")
DENSE = "float32"
ARMS: dict[str, tuple[int, ...]] = {"8,4,2": (8, 4, 2), "8,4": (8, 4), "8": (8,), "4": (4,), "2": (2,)}
TIMED = (DENSE, "8,4,2", "4")
PIECE, BLOCK = 256, 64


def page(model: str, text: str, tokens: int, contexts: list[int], rounds: int) -> str:
    """Both tables, as Markdown."""
    about = (
        f"{model} in float32 on {text}; {cpu_name()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}."
    )
    command = "`python -m benchmarks kv-caches` makes this page."
    parts = ["# Caches of keys and values", command, f"{about}\n{__doc__}".strip()]
    parts += [f"## Memory of {tokens} tokens", memory_table(model, text, tokens)]
    parts += ["## Time of a token", time_table(model, text, contexts, rounds)]
    return "\n\n".join(parts)


def made(arm: str, config: Any) -> Any:
    """An empty cache."""
    return (
        DynamicCache(config=config) if arm == DENSE else StaircaseCache(config, bits=ARMS[arm], residual_length=BLOCK)
    )


def held(cache: Any) -> int:
    """Bytes of a cache's tensors."""
    if isinstance(cache, StaircaseCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def memory_table(model: str, text: str, tokens: int) -> str:
    """Bytes and memory of every cache, each measured in its own process, beside the dense one."""
    found = {arm: in_a_process(arm, model, text, tokens) for arm in (DENSE, *ARMS)}
    lines = [
        "| bits | cache, MiB | of float32's | resident, MiB | of float32's | peak, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for arm, (size, resident, peak) in found.items():
        shares = (f"{part / whole:.3f}" for part, whole in zip((size, resident), found[DENSE][:2], strict=True))
        cells = (f"{size / 2**20:.1f}", next(shares), f"{resident / 2**20:.1f}", next(shares), f"{peak / 2**20:.1f}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def in_a_process(arm: str, *what: Any) -> tuple[int, int, int]:
    """Bytes of a cache's tensors, resident memory and peak, from a process that fills it."""
    worker = Worker(f"the run of {arm}", _serve, arm, *what, torch.get_num_threads(), remedy="try fewer tokens")
    found = worker.receive()
    worker.close()
    return found


def _serve(pipe: Connection, arm: str, model: str, text: str, tokens: int, threads: int) -> None:
    """Send bytes of the cache, resident memory and peak of a cache that the model has filled."""
    return_large_blocks()
    torch.set_num_threads(threads)
    lm, ids = opened(model, text, tokens)
    fill(lm, made(arm, lm.config), ids[:, :PIECE])  # what the first pass allocates for good is not the cache's
    with PeakMemory() as before:
        pass
    cache = made(arm, lm.config)
    with PeakMemory() as filling:
        fill(lm, cache, ids)
    with PeakMemory() as after:
        pass
    pipe.send((held(cache), after.peak - before.peak, filling.peak - before.peak))


def opened(model: str, text: str, tokens: int) -> tuple[Any, torch.Tensor]:
    """The model, and the first tokens of a text [1, tokens]."""
    lm, tokenizer = loading.load(model, torch.float32)
    ids = data.pack(data.load_text(text), tokenizer, block_size=tokens)[0]["input_ids"]
    return lm.eval(), torch.tensor([ids])


@torch.no_grad()
def fill(lm: Any, cache: Any, ids: torch.Tensor) -> None:
    """Read a text into a cache, in pieces."""
    for piece in ids.split(PIECE, dim=1):
        lm.base_model(input_ids=piece, use_cache=True, **{cache_name(lm): cache})


@torch.no_grad()
def step(lm: Any, cache: Any, token: torch.Tensor) -> float:
    """CPU seconds of one step of generation, but for the choice of the token."""
    start = time.process_time()
    lm(input_ids=token, use_cache=True, **{cache_name(lm): cache})
    return time.process_time() - start


def time_table(model: str, text: str, contexts: list[int], rounds: int) -> str:
    """Milliseconds of a token after every context, of every timed cache, and ratios to the dense one."""
    lines = ["| tokens before | bits | a token, ms | ratio | a block of tokens, ratio |", "|---|---|---|---|---|"]
    for context in contexts:
        lm, ids = opened(model, text, context + rounds * BLOCK)
        caches = {arm: made(arm, lm.config) for arm in TIMED}
        for cache in caches.values():
            fill(lm, cache, ids[:, :context])
        seconds = {arm: torch.zeros(rounds * BLOCK, dtype=torch.float64) for arm in TIMED}
        for at in range(rounds * BLOCK):
            token = ids[:, context + at : context + at + 1]
            for arm, cache in list(caches.items())[:: 1 if at % 2 else -1]:
                seconds[arm][at] = step(lm, cache, token)
        for arm in TIMED:
            lines.append(f"| {context} | {arm} | {' | '.join(_cells(seconds[arm], seconds[DENSE]))} |")
    return "\n".join(lines)


def _cells(ours: torch.Tensor, dense: torch.Tensor) -> list[str]:
    """Median of a token in milliseconds, and median ratios of a token and of a block."""
    blocks = ours.view(-1, BLOCK).sum(-1) / dense.view(-1, BLOCK).sum(-1)
    medians = (1e3 * median(ours.tolist()), median((ours / dense).tolist()), median(blocks.tolist()))
    return [f"{medians[0]:.1f}", f"{medians[1]:.2f}", f"{medians[2]:.2f}"]
