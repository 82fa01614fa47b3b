"""What a grid of losses costs: a source that is read once for all candidates, against every pair as its own sequence.

Sources and candidates are the prompts of `examples/loss_retrieval.py`. Seconds are those of the processor, one thread;
for pairs that are read alone they are measured on a sample, and the cost of a source is an estimate from it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.loss_retrieval import prompts
from hf_xent.bench.memory import PeakMemory
from hf_xent.models import loading
from hf_xent.models.contexts import eval_mode
from hf_xent.patching import patched
from hf_xent.retrieval import WAYS, GridScorer
from hf_xent.retrieval.reading import Reader
from hf_xent.system.machine import cpu_name


def page(folder: Path, model: str, sources: int, pairs: int) -> str:
    """The table, as Markdown."""
    torch.set_num_threads(1)
    english, french = prompts(folder / "en"), prompts(folder / "fr")
    network, tokenizer = loading.load(model, torch.bfloat16)
    encoder = GridScorer(network, tokenizer, template="French: {}\nEnglish:", target=" {}\n").encoder
    keys = [key for key in english if key in french]
    candidates = sorted({encoder.candidate(english[key]) for key in keys})
    inputs = sorted((encoder.source(french[key]) for key in keys), key=lambda source: source["input_ids"].shape[1])
    some = [inputs[i] for i in np.linspace(0, len(inputs) - 1, sources + 2).astype(int)[1:-1]]
    rows = []
    with torch.no_grad(), eval_mode(network), patched(network, always=True):
        for way in WAYS:
            sample = candidates if way != "alone" else [candidates[i] for i in _places(len(candidates), pairs)]
            reader = Reader(encoder, sample, way)
            reader(some[0])  # a warm-up
            seconds, memory = zip(*(_measured(reader, source) for source in some), strict=True)
            whole = np.mean(seconds) * len(candidates) / len(sample)
            read = sum(pack.ids.numel() for pack in reader.packs)
            note = f" (estimate from {len(sample)} pairs each)" if len(sample) < len(candidates) else ""
            rows.append((way, read, whole, max(memory), note))
    slow = rows[-1][2]
    lines = [
        f"| {way} | {read or ''} | {whole:.2f}{note} | {slow / whole:.1f} | {memory / 2**20:.0f} |"
        for way, read, whole, memory, note in rows
    ]
    lengths = [source["input_ids"].shape[1] for source in some]
    predicted = sum(map(len, candidates))
    return f"""# The cost of a grid of losses

{model} in bfloat16, one thread of {cpu_name()}, torch {torch.__version__}; {len(candidates)} candidates of {predicted}
tokens after each of {sources} sources of {", ".join(map(str, lengths))} tokens, the real prompts of
`examples/loss_retrieval.py`.
`alone` is the patched model's plain forward of one pair at a time, whose cost for a source is an estimate from a
sample. Memory is the increase of the process while one source is read. `python -m benchmarks retrieval --folder FOLDER`
makes this page.

| way | tokens read | CPU seconds a source | times faster than alone | MiB |
|---|---:|---:|---:|---:|
{chr(10).join(lines)}
"""


def _places(count: int, pairs: int) -> list[int]:
    """Candidates drawn without replacement, the same every time."""
    return sorted(np.random.default_rng(0).choice(count, min(pairs, count), replace=False).tolist())


def _measured(reader: Reader, source: dict[str, Any]) -> tuple[float, int]:
    """CPU seconds and additional bytes of a source."""
    with PeakMemory() as memory:
        start = time.process_time()
        reader(source)
        seconds = time.process_time() - start
    return seconds, memory.extra
