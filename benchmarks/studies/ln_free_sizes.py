"""The authors' recipes for GPT-2 small to XL, dry-run from random weights of true size: memory and time a step.

python -m benchmarks.studies.ln_free_sizes benchmarks/results/studies/ln-free-sizes

memory    `hf_xent.planning` on fake tensors: a step of the recipe's micro batch of 1024 tokens each, in bfloat16 as
          the authors trained, with weights, gradients, AdamW, activations and logits. An estimate.
time      seconds of one core, of one true block of the size, forward and backward, and of one true optimizer step
          of its weights; a step is estimated from that as  tokens x (layers x block + head) + optimizer, where the
          head is taken to cost what a block does for each parameter. An estimate.
removal   every size is trained, in true size, to its first removal, at the recipe's step, with shorter and fewer
          sequences.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from time import process_time
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

import hf_xent
from hf_xent import ln_free, planning
from hf_xent.trainers.ln_recipes import RECIPES

SHAPES = {"gpt2": (12, 768, 12), "gpt2-medium": (24, 1024, 16), "gpt2-large": (36, 1280, 20), "gpt2-xl": (48, 1600, 25)}
"""Size -> layers, width, heads: those of the published checkpoints."""
OPTIMIZERS = {"gpt2": "adamw_torch"} | dict.fromkeys(("gpt2-medium", "gpt2-large", "gpt2-xl"), "adafactor")
"""Size -> optimizer on the way to the first removal; the state of AdamW takes as much memory as the model twice."""
CONTEXT, TIMED = 1024, 256
"""Tokens of a sequence of the recipes, and of the timed one."""


def config_of(size: str, **changes: Any) -> GPT2Config:
    """The published configuration without dropout."""
    layers, width, heads = SHAPES[size]
    shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": CONTEXT}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**shape | none | {"activation_function": "gelu_new"} | changes)


def memory(size: str, **options: Any) -> dict[str, float]:
    """The estimated peak of the recipe's step, GB by component, and on which GPU it fits."""
    recipe = RECIPES[size]
    settings = {"sequence_length": CONTEXT, "dtype": "bf16", "accumulation": recipe.accumulation}
    plan = planning.plan(config_of(size), recipe.batch_size * CONTEXT, **settings | options)
    peak = plan["hf_xent"]
    parts = {name: getattr(peak, name) / 1e9 for name in ("weights", "gradients", "optimizer", "activations", "logits")}
    return parts | {"total": peak.total / 1e9, "stock": plan["stock"].total / 1e9, "parameters": plan.parameters / 1e6}


def block_time(size: str, repeats: int = 3) -> dict[str, float]:
    """Seconds a token of one true block with removable norms, forward and backward, and of its optimizer step."""
    model = ln_free.wrap(GPT2LMHeadModel(config_of(size, n_layer=1, vocab_size=256)).bfloat16().train())
    block, width = model.transformer.h[0], SHAPES[size][1]
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-4, foreach=True)
    x = torch.randn(1, TIMED, width, dtype=torch.bfloat16, requires_grad=True)
    forward, step = [], []
    for _ in range(repeats + 1):
        start = process_time()
        block(x)[0].float().square().mean().backward()
        forward.append(process_time() - start)
        start = process_time()
        optimizer.step()
        step.append(process_time() - start)
    count = sum(p.numel() for p in block.parameters())
    return {"seconds a token": min(forward[1:]) / TIMED, "optimizer": min(step[1:]), "parameters": count}


def step_time(size: str) -> dict[str, float]:
    """The estimated seconds of an optimizer step of the recipe on this machine."""
    recipe, layers = RECIPES[size], SHAPES[size][0]
    block = block_time(size)
    head = 50257 * SHAPES[size][1]
    tokens = recipe.batch_size * recipe.accumulation * CONTEXT
    a_token = block["seconds a token"] * (layers + head / block["parameters"])
    all_parameters = layers * block["parameters"] + head
    optimizer = block["optimizer"] * all_parameters / block["parameters"]
    first = ln_free.Schedule.named(size).events[0][0]
    return {
        "a token (ms)": 1000 * a_token, "optimizer (s)": optimizer, "step (s)": tokens * a_token + optimizer,
        "first removal": first,
    }  # fmt: skip


def to_first_removal(size: str, length: int = 128) -> dict[str, Any]:
    """A size from random weights, trained by its recipe to the step after the first removal."""
    torch.manual_seed(0)
    schedule = ln_free.Schedule(ln_free.Schedule.named(size).events[:1])
    steps = schedule.events[0][0] + 2
    model = GPT2LMHeadModel(config_of(size)).bfloat16()
    ids = torch.randint(0, 1000, (steps, length)).tolist()
    changes = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": steps, "bf16": False,
        "lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {}, "save_strategy": "no",
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "optim": OPTIMIZERS[size], "memory_budget": 2**26,
        "schedule": "scaled",
    }  # fmt: skip
    config = RECIPES[size].config(mkdtemp(), **changes)
    start = process_time()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    trainer = hf_xent.LNRemovalTrainer(model, config, schedule=schedule, train_dataset=rows)
    trainer.train()
    seconds = (process_time() - start) / steps
    log = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "optimizer": OPTIMIZERS[size], "steps": steps, "tokens a step": length, "seconds a step": seconds,
        "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "norms": [row["norms"] for row in log], "loss": [float(row["loss"]) for row in log],
        "sigma term": [float(row["loss_sigma"]) for row in log],
    }  # fmt: skip


def main(output: Annotated[Path, typer.Argument(help="The folder of sizes.json.")]) -> None:
    """Estimates all sizes, and trains each to its first removal."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / "sizes.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for size in SHAPES:
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "memory": partial(memory, size), "checkpointed": partial(memory, size, gradient_checkpointing=True),
            "time": partial(step_time, size), "removal": partial(to_first_removal, size),
        }  # fmt: skip
        for name, part in parts.items():
            if name not in found.setdefault(size, {}):
                found[size][name] = part()
                file.write_text(json.dumps(found, indent=1))
                print(size, name, found[size][name], flush=True)


if __name__ == "__main__":
    typer.run(main)
