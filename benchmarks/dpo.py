"""One DPO step, TRL's own against the same step without logits: `python -m benchmarks dpo`.

Each side has its own process, a policy and a reference model in float32, and one batch of real text: forward of both
models, loss, backward. The first step of each is its warm-up and gives its memory (what the step adds to the two
models, the gradients included); then the parent asks for one step of each in turn, so that what else happens on the
machine meets both alike, and the time is the median of the ratios within a round. Loss and gradient norm must agree.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch

from hf_xent import data
from hf_xent.bench.memory import PeakMemory
from hf_xent.models import loading

SIDES = ("TRL", "hf_xent")
RTOL = 1e-3  # float32 sums of thousands of log-probabilities, in another order


@dataclass(frozen=True)
class Step:
    """What one step took, and what it found."""

    seconds: float
    mib: float
    loss: float
    grad_norm: float


def run(model: str, pairs: int, tokens: int, prompt: int, rounds: int) -> dict[str, list[Step]]:
    """The warm-up and `rounds` timed steps of both sides. Raises: RuntimeError if they do not agree."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for side in SIDES:
        pipes[side], theirs = context.Pipe()
        shape = (model, pairs, tokens, prompt)
        context.Process(target=_serve, args=(theirs, side, *shape, torch.get_num_threads()), daemon=True).start()
        theirs.close()  # so that the end of a process is the end of its pipe
    found: dict[str, list[Step]] = {side: [] for side in SIDES}
    for place in range(rounds + 1):
        for side in SIDES if place % 2 else reversed(SIDES):
            pipes[side].send(True)
            found[side].append(_receive(side, pipes[side]))
        ours, stock = found["hf_xent"][-1], found["TRL"][-1]
        for name in ("loss", "grad_norm"):
            one, other = getattr(ours, name), getattr(stock, name)
            if abs(one - other) > RTOL * abs(other):
                raise RuntimeError(f"the two sides do not agree: {name} is {one} for hf_xent and {other} for TRL")
    for pipe in pipes.values():
        pipe.send(False)
    return found


def table(found: dict[str, list[Step]]) -> str:
    """Markdown: memory of the first step, times of the others, and the ratios to TRL."""
    lines = ["| | extra memory, MiB | seconds a step | memory / TRL | time / TRL |", "|---|---|---|---|---|"]
    base = found["TRL"]
    for side, steps in found.items():
        ratio = median(mine.seconds / theirs.seconds for mine, theirs in zip(steps[1:], base[1:], strict=True))
        seconds = median(step.seconds for step in steps[1:])
        memory = steps[0].mib / base[0].mib
        lines.append(f"| {side} | {steps[0].mib:.0f} | {seconds:.1f} | {memory:.2f} | {ratio:.2f} |")
    return "\n".join(lines)


def _receive(side: str, pipe: Connection) -> Step:
    try:
        found: Step = pipe.recv()
    except EOFError:
        raise RuntimeError(f"the run of {side} ended without a word (killed for memory?): try fewer pairs") from None
    return found


def _serve(pipe: Connection, side: str, model: str, pairs: int, tokens: int, prompt: int, threads: int) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer, batch = _trainer(side, model, folder), _batch(model, pairs, tokens, prompt)
        while pipe.recv():
            trainer.model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            with PeakMemory() as memory:
                loss = trainer.training_step(trainer.model, dict(batch))
            seconds = time.perf_counter() - start
            norm = torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm()
            pipe.send(Step(seconds, memory.extra / 2**20, loss.item(), norm.item()))


def _trainer(side: str, name: str, folder: str) -> Any:
    """A trainer of one side; its reference differs from its policy, so that the margin is not 0."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from hf_xent.trainers import SPCEConfig, SPCETrainer

    model, tokenizer = loading.load(name)
    reference, _ = loading.load(name)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.01)
    kind, config = (DPOTrainer, DPOConfig) if side == "TRL" else (SPCETrainer, SPCEConfig)
    arguments = config(output_dir=folder, report_to="none", use_cpu=True, bf16=False)
    rows = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    trainer = kind(model, reference, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1  # set by `train`, which is not called
    return trainer


def _batch(model: str, pairs: int, tokens: int, prompt: int) -> dict[str, torch.Tensor]:
    _, tokenizer = loading.load(model)
    blocks = data.pack(data.load_text("pydoc", split="train[:30%]"), tokenizer, block_size=tokens)
    ids = torch.tensor(blocks["input_ids"][: 2 * pairs])
    ids[pairs:, :prompt] = ids[:pairs, :prompt]
    mask = torch.ones_like(ids)
    completion = mask.clone()
    completion[:, :prompt] = 0
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}
