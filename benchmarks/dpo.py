"""One DPO step of TRL compared with the same step without logits: `python -m benchmarks dpo`.

Each side has its own process, a policy and a reference model in float32, and one batch of real text: forward of both
models, loss, backward. The first step of each side is its warm-up, in which its memory is measured (the increase over
the two models, with the gradients). Then the parent requests one step of each in turn, so that other load on the
machine slows both alike, and takes the median of the ratios within a round. Loss and gradient norm must agree.
"""

from __future__ import annotations

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
from hf_xent.system.processes import Worker

SIDES = ("TRL", "hf_xent")
REMEDY = "try fewer pairs"
RTOL = 1e-3  # float32 sums of thousands of log-probabilities in different orders


@dataclass(frozen=True)
class Shape:
    """The model of a step and the shape of its batch."""

    model: str
    pairs: int
    tokens: int  # of prompt and answer
    prompt: int  # tokens of the prompt


@dataclass(frozen=True)
class Step:
    """Time and memory of one step, and the numbers that both sides have to agree on."""

    seconds: float
    mib: float
    loss: float
    grad_norm: float


def run(shape: Shape, rounds: int) -> dict[str, list[Step]]:
    """Run a warm-up and `rounds` timed steps of both sides. Raises: RuntimeError if they do not agree."""
    threads = torch.get_num_threads()
    workers = {side: Worker(f"the run of {side}", _serve, side, shape, threads, remedy=REMEDY) for side in SIDES}
    steps: dict[str, list[Step]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):
        for side in SIDES if number % 2 else reversed(SIDES):
            workers[side].send(True)
            steps[side].append(workers[side].receive())
        _check_agreement(steps["hf_xent"][-1], steps["TRL"][-1])
    for worker in workers.values():
        worker.send(False)
        worker.close()
    return steps


def _check_agreement(ours: Step, stock: Step) -> None:
    for name in ("loss", "grad_norm"):
        value, expected = getattr(ours, name), getattr(stock, name)
        if abs(value - expected) > RTOL * abs(expected):
            raise RuntimeError(f"the two sides do not agree: {name} is {value} for hf_xent and {expected} for TRL")


def table(measured: dict[str, list[Step]]) -> str:
    """A Markdown table: memory of the first step, times of the others, and the ratios to TRL."""
    lines = ["| | extra memory, MiB | seconds a step | memory / TRL | time / TRL |", "|---|---|---|---|---|"]
    base = measured["TRL"]
    for side, steps in measured.items():
        ratio = median(step.seconds / other.seconds for step, other in zip(steps[1:], base[1:], strict=True))
        seconds = median(step.seconds for step in steps[1:])
        memory = steps[0].mib / base[0].mib
        lines.append(f"| {side} | {steps[0].mib:.0f} | {seconds:.1f} | {memory:.2f} | {ratio:.2f} |")
    return "\n".join(lines)


def _serve(pipe: Connection, side: str, shape: Shape, threads: int) -> None:
    """Take a step of one side whenever the parent sends True."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer, batch = _trainer(side, shape.model, folder), _batch(shape)
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
    trainer_class, config_class = (DPOTrainer, DPOConfig) if side == "TRL" else (SPCETrainer, SPCEConfig)
    arguments = config_class(output_dir=folder, report_to="none", use_cpu=True, bf16=False)
    rows = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    trainer = trainer_class(model, reference, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1  # usually set by `train`, which is not called
    return trainer


def _batch(shape: Shape) -> dict[str, torch.Tensor]:
    """A batch of pairs of real text, chosen answers first; both answers of a pair have the same prompt."""
    _, tokenizer = loading.load(shape.model)
    blocks = data.pack(data.load_text("pydoc", split="train[:30%]"), tokenizer, block_size=shape.tokens)
    ids = torch.tensor(blocks["input_ids"][: 2 * shape.pairs])
    ids[shape.pairs :, : shape.prompt] = ids[: shape.pairs, : shape.prompt]
    mask = torch.ones_like(ids)
    completion = mask.clone()
    completion[:, : shape.prompt] = 0
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}
