"""A GPT-2 of 14 million parameters without LayerNorm: what removal costs, and what it does to three tools.

The model of base.py is fine-tuned on the encyclopedia and the Brown corpus, with its norms or under their removal. The
arms of a seed see the same batches. What is measured is on held-out documents of the same two sources, in float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from datasets import Dataset
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

import hf_xent
from benchmarks.studies.base import CONTEXT, documents, new_model, train_tokenizer
from benchmarks.studies.ln_free_neurons import Neurons
from benchmarks.studies.ln_free_patching import Pairs, patched
from benchmarks.studies.plan import Job, Plan
from hf_xent import data, ln_free
from hf_xent.experiments.claims import Claim

STEPS, ROWS, RATE, SOURCES = 160, 8, 6e-4, ("wiki", "brown")
HELD_OUT, PAIRS, ANALYZED = 96, 64, 24
"""Held-out blocks for the losses, pairs for patching, and blocks for the attributions of heads."""
REMOVALS: dict[str, dict[str, Any] | None] = {
    "original": None, "vanilla": None, "LN-free": {}, "LN-free, all at once": {"schedule": "at_once"},
}  # fmt: skip


def start(job: Job) -> tuple[Any, Any]:
    """The pre-trained model and its tokenizer."""
    if not job.tiny:
        return GPT2LMHeadModel.from_pretrained(job.base), PreTrainedTokenizerFast.from_pretrained(job.base)
    tokenizer = train_tokenizer(_toy()["text"][:], vocabulary=300)
    torch.manual_seed(0)
    return new_model(tokenizer, n_layer=2, n_embd=24, n_head=2, n_positions=32), tokenizer


def _toy() -> Dataset:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "seven", "wizards"]
    return Dataset.from_dict(
        {"text": [" ".join(words[(i * j + i) % 12 % 11] for j in range(60)) for i in range(1, 40)]}
    )


def blocks_of(job: Job, part: str, tokenizer: Any) -> Any:
    """The packed blocks of a part."""
    texts = _toy() if job.tiny else documents(job.text, *SOURCES)[part]
    return data.pack(texts, tokenizer, block_size=32 if job.tiny else CONTEXT)


def tuned(arm: str, seed: int, job: Job) -> tuple[Any, float]:
    """The model of an arm, and the worst training loss over five steps after the first removal."""
    model, tokenizer = start(job)
    if arm == "original":
        return model.eval(), float("nan")
    steps, options = job.scaled(STEPS, 12), REMOVALS[arm]
    shared: dict[str, Any] = {
        "output_dir": str(job.work / "run"), "max_steps": steps, "per_device_train_batch_size": ROWS, "seed": seed,
        "learning_rate": RATE, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": RATE / 2},
        "warmup_steps": steps // 12, "weight_decay": 0.01, "logging_steps": 5, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "memory_budget": 2**26, "bf16": True, "use_cpu": job.device == "cpu",
    }  # fmt: skip
    kind = hf_xent.XentTrainer if options is None else hf_xent.LNRemovalTrainer
    trainer = kind(
        model, kind.config_class(**shared | (options or {})), train_dataset=blocks_of(job, "train", tokenizer)
    )
    trainer.train()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    hf_xent.unpatch(model)
    curve = [math.log(row["perplexity"]) for row in trainer.state.log_history if "loss" in row]
    return model.eval().cpu(), max(curve)


def run(arm: str, seed: int, job: Job) -> dict[str, float]:
    """One arm under one seed."""
    job.work.mkdir(parents=True, exist_ok=True)
    original, tokenizer = start(job)
    original.eval()
    test = torch.tensor(blocks_of(job, "test", tokenizer)["input_ids"][:])
    test = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))]
    held_out, rest = test[: job.scaled(HELD_OUT, 6)], test[job.scaled(HELD_OUT, 6) :]
    pairs = Pairs.of(original, rest, job.scaled(PAIRS, 8), seed)
    file = job.work / "neurons-gpt2.json"
    if not file.exists():
        train = torch.tensor(blocks_of(job, "train", tokenizer)["input_ids"][: job.scaled(8, 4)])
        Neurons.chosen(original, train).save(file)
    model, worst = tuned(arm, seed, job)
    patching = patched(model, pairs)
    analysis = ln_free.analyze(model, held_out[: job.scaled(ANALYZED, 4)])
    found = {
        "loss": loss_of(model, held_out), "worst 5 steps": worst, "patching error": patching.error,
        "patching correlation": patching.correlation, "DLA error (%)": 100 * analysis.mean_nmae, "ECE": analysis.ece,
    }  # fmt: skip
    found |= {f"patching error, layer {i}": error for i, error in enumerate(patching.by_layer())}
    found |= Neurons.load(file).effects(model, held_out)
    return {name: value for name, value in found.items() if value == value}


@torch.no_grad()
def loss_of(model: Any, blocks: torch.Tensor) -> float:
    """Nats per token in float32."""
    losses = []
    for ids in blocks.split(8):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none"))
    return float(torch.cat(losses).mean())


PLAN = Plan(
    name="ln-free-gpt2",
    arms=tuple(REMOVALS),
    baseline="vanilla",
    metrics=(
        "loss", "worst 5 steps", "patching error", "patching correlation", "DLA error (%)", "entropy moved (%)", "ECE",
    ),
    claims=(
        Claim("vanilla", "loss", 0.05, higher=False, against="LN-free"),
        Claim("LN-free", "loss", 0.01, higher=False, against="LN-free, all at once"),
        Claim("LN-free", "patching error", 0.05, higher=False),
        Claim("LN-free", "DLA error (%)", 5.0, higher=False),
    ),
    seeds=4,
    run=run,
    settings={"steps": STEPS, "rows": ROWS, "rate": RATE, "sources": SOURCES, "held out": HELD_OUT, "pairs": PAIRS},
)  # fmt: skip
