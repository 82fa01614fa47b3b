"""How many more tokens fit into a fixed memory without logits, and what does a step cost in time?

Two plans. `cce-capacity`: its 'seeds' are eight trainings (two models, full and LoRA, with gradient checkpointing and
without); for each, the largest batch of short sequences and the longest single sequence whose step fits, stock and
patched, predicted by `hf_xent.planning` and then found by real steps in fresh processes under a limit that the kernel
enforces. `cce-step-time`: steps with and without the patch in turn, in fresh processes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import product
from typing import Any

from benchmarks.studies.cce_steps import PATCHED, STOCK, Training, remote
from benchmarks.studies.plan import PILOT_SEED, Job, Plan
from hf_xent import planning
from hf_xent.experiments.claims import Claim
from hf_xent.system.files import replace_atomically

TINY = {
    "model_type": "llama", "vocab_size": 16384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
MODELS = ("smollm2", "gemma3-270m")
TRAININGS = [Training(*each) for each in product(MODELS, (False, True), (False, True))]
ROOM, ROW, MOST = 1 << 30, 64, 8192  # bytes; tokens of a sequence in a batch; tokens beyond which nothing is tried
CLOSE = 1.05  # how near the border is found
CAPACITY, TIME = "cce-capacity", "cce-step-time"
FEWEST = {"batch": 1, "sequence": 16}
SHAPES = {"smollm2": (4, 128), "gemma3-270m": (2, 128)}


def _shape(kind: str, size: int) -> dict[str, int]:
    """A batch of `size` short sequences, or one sequence of `size` tokens."""
    return {"rows": size, "length": ROW} if kind == "batch" else {"rows": 1, "length": size}


def predicted(training: Training, arm: str, kind: str, room: int, most: int) -> int:
    """The largest size that should fit by the account of `hf_xent.planning`, which runs the model on fake tensors."""
    name = STOCK if arm == STOCK else "hf_xent"

    def need(size: int) -> float:
        shape = _shape(kind, size)
        tokens = shape["rows"] * shape["length"]
        peak = planning.plan(training.model, tokens, sequence_length=shape["length"], **training.options)[name]
        return peak.activations + peak.logits

    return _secant(need, room, FEWEST[kind], most)


def _secant(need: Callable[[int], float], room: int, fewest: int, most: int) -> int:
    """The largest size, to about 3 %, whose need is within the room; the need grows with the size."""
    low, high = 2 * fewest, 4 * fewest
    a, b = need(low), need(high)
    fits, fails = (0, most + 1) if b > room else (high, most + 1)
    if b > room:
        fits, fails = (low, high) if a <= room else (0, low)
    for _ in range(10):
        if fails - fits <= 1 or fits >= most or 0.97 * room <= (b if high == fits else 0) <= room:
            break
        size = math.floor(high + (room - b) * (high - low) / (b - a)) if b != a else most
        size = max(fits + 1, min(fails - 1, size))
        low, a, high, b = high, b, size, need(size)
        fits, fails = (size, fails) if b <= room else (fits, size)
    return max(fewest, min(most, fits))


def border(fits: Callable[[int], bool], start: int, fewest: int, most: int) -> tuple[int, int]:
    """The largest size found to fit, 0 if none does, and the smallest found not to, `most` + 1 if none.

    It goes out from `start` with growing steps until both are known, and halves what is between them until they are
    within a factor of CLOSE, or neighbours.
    """
    low, high, factor, size = 0, most + 1, CLOSE, start
    while True:
        if fits(size):
            low = size
            if high > most and size < most:
                size, factor = min(most, max(size + 1, math.floor(size * factor))), factor**2
                continue
        else:
            high = size
            if low == 0 and size > fewest:
                size, factor = max(fewest, min(size - 1, math.ceil(size / factor))), factor**2
                continue
        if low == most or high <= fewest or high - low <= 1 or high <= low * CLOSE:
            return low, high
        size = (low + high) // 2


def capacity(arm: str, seed: int, job: Job) -> dict[str, float]:
    """The largest batch and the longest sequence of one training, in tokens and in doublings."""
    training, room = TRAININGS[seed % len(TRAININGS)], ROOM
    if job.tiny:
        training, room = Training(TINY, bool(seed % 2), False), 96 << 20
    file = job.work / f"{CAPACITY}-{seed}-{room >> 20}.json"
    tried: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    found: dict[str, float] = {}
    for kind in ("batch", "sequence"):
        limit = planning.shapes.config_of(training.model).get_text_config().max_position_embeddings
        most = MOST // ROW if kind == "batch" else min(MOST, int(limit))

        def attempt(size: int, kind: str = kind) -> bool:
            key = f"{arm} {kind} {size}"
            if key not in tried:
                tried[key] = remote("tries", training, arm=arm, room=room, **_shape(kind, size))
                job.work.mkdir(parents=True, exist_ok=True)
                replace_atomically(file, lambda draft: draft.write_text(json.dumps(tried, indent=1)))
            return bool(tried[key]["fits"])

        key = f"{arm} {kind} predicted"
        tried[key] = tried.get(key) or predicted(training, arm, kind, room, most)
        low, high = border(attempt, tried[key], FEWEST[kind], most)
        per = ROW if kind == "batch" else 1
        found |= {f"{kind} tokens": low * per, f"{kind} predicted": tried[key] * per, f"{kind} fails": high * per}
        found[f"{kind} doublings"] = math.log2(max(low, 0.5) * per)
        found[f"{kind} seconds"] = tried.get(f"{arm} {kind} {low}", {}).get("seconds", 0.0)
    return found


def step_time(arm: str, seed: int, job: Job) -> dict[str, float]:
    """The time of a step over that of a stock step, for every training; both arms are of the same process."""
    file = job.work / f"{TIME}-{seed}.json"
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    trainings = [Training(TINY, False, False)] if job.tiny else TRAININGS
    pilot = seed >= PILOT_SEED
    if pilot:
        trainings = [training for training in trainings if not training.checkpointing]
    for training in trainings:
        if str(training) not in kept:
            rows, length = (2, 32) if job.tiny else SHAPES[training.model]
            rounds = 2 if job.tiny or pilot else 4
            kept[str(training)] = remote("times", training, rows=rows, length=length, rounds=rounds)
            job.work.mkdir(parents=True, exist_ok=True)
            replace_atomically(file, lambda draft: draft.write_text(json.dumps(kept, indent=1)))
    seconds = {f"{name}: seconds": row[arm] for name, row in kept.items()}
    return {name: row["ratio"] if arm == PATCHED else 1.0 for name, row in kept.items()} | seconds


def _times() -> tuple[Claim, ...]:
    plain = [str(training) for training in TRAININGS if not training.checkpointing]
    return tuple(Claim(PATCHED, name, margin=0.05, higher=False) for name in plain)


PLANS = (
    Plan(
        CAPACITY,
        (STOCK, PATCHED),
        STOCK,
        ("batch tokens", "batch doublings", "sequence tokens", "sequence doublings", "batch predicted"),
        tuple(Claim(PATCHED, f"{kind} doublings", margin=0.585) for kind in ("batch", "sequence")),
        len(TRAININGS),
        capacity,
        {"room_mib": ROOM >> 20, "row": ROW, "most": MOST},
    ),
    Plan(TIME, (STOCK, PATCHED), STOCK, tuple(map(str, TRAININGS)), _times(), 5, step_time),
)
