"""SmolLM2-135M without its 61 norms: how often it overflows, where, and whether training on or a clip removes it.

All arms of a seed see the same blocks: 256 tokens of the Brown corpus, the first of which begins a text. The arms
without norms share their first phase, in which all norms fade together; its model is kept in the folder of the study.
They differ in the second, at full share: there is none; it is like the first; or no pass is left out, and the divisor
of every token is at least sigma_x / CLIP, so that passes that would overflow train the model, too.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from datasets import Dataset

import hf_xent
from benchmarks.studies.base import documents
from benchmarks.studies.ln_free_neurons import Neurons
from benchmarks.studies.ln_free_overflow import measured
from benchmarks.studies.plan import Job, Plan
from hf_xent import data, ln_free
from hf_xent.experiments.claims import Claim
from hf_xent.models import loading

BLOCK, ROWS, RATE, CLIP = 256, 2, 2e-4, 2.0
FADING, AFTER = 140, 60
"""Steps of the two phases."""
BLOCKS = {"brown": 160, "debian-policy": 48}
"""Blocks on which overflow is measured, by source."""
REMOVAL = {
    "schedule": "at_once", "removal_start": 0.25, "removal_taper": 0.7, "sigma_weight": 0.0, "sigma_median": True,
    "spread_weight": 100.0,
}  # fmt: skip
AT_FULL_SHARE = REMOVAL | {"removal_taper": 0.0}
ARMS = ("vanilla", "LN-free, faded only", "LN-free", "LN-free, clipped")


def rows_of(job: Job, source: str, part: str, tokenizer: Any) -> torch.Tensor:
    """Blocks of a source: the token that begins a text, and what follows in the packed documents."""
    block = 16 if job.tiny else BLOCK
    texts = Dataset.from_dict({"text": ["the quick brown fox " * 40] * 9}) if job.tiny else documents(job.text, source)
    packed = data.pack(texts if job.tiny else texts[part], tokenizer, block_size=block - 1)
    ids = torch.tensor(packed["input_ids"][:])
    return torch.cat([torch.full((len(ids), 1), tokenizer.bos_token_id), ids], 1)


def train(model: Any, options: dict[str, Any], blocks: torch.Tensor, steps: int, job: Job, **shape: Any) -> None:
    """Fine-tunes a model in place, under norm removal if there are options for it."""
    shared: dict[str, Any] = {
        "output_dir": str(job.work / "run"), "max_steps": steps, "per_device_train_batch_size": ROWS,
        "learning_rate": RATE, "optim": "adafactor", "logging_steps": 10, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "bf16": True, "use_cpu": job.device == "cpu",
    }  # fmt: skip
    kind = hf_xent.LNRemovalTrainer if options else hf_xent.XentTrainer
    rows = Dataset.from_dict({"input_ids": blocks.tolist(), "labels": blocks.tolist()})
    trainer = kind(model, kind.config_class(**shared | shape | options), train_dataset=rows)
    trainer.train()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # the next phase has another trainer
    hf_xent.unpatch(model)
    log = [row for row in trainer.state.log_history if "loss" in row]
    with (job.work / "log.jsonl").open("a") as file:
        file.write(json.dumps({"options": str(options), "log": log}) + "\n")


def fresh(job: Job) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    if not job.tiny:
        model, tokenizer = loading.load("smollm2")
        return model.float().to(job.device), tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = loading.tokenizer_of("smollm2")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **ends)), tokenizer


def tuned(arm: str, seed: int, job: Job) -> tuple[Any, Any]:
    """The model of an arm, and the tokenizer."""
    model, tokenizer = fresh(job)
    first, second = job.scaled(FADING, 8), job.scaled(AFTER, 2)
    blocks = rows_of(job, "brown", "train", tokenizer)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    blocks = blocks[order.repeat(1 + ROWS * (first + second) // len(blocks))]
    early, late = blocks[: ROWS * first], blocks[ROWS * first : ROWS * (first + second)]
    begin = {"seed": seed, "warmup_steps": min(10, first // 2), "lr_scheduler_type": "constant_with_warmup"}
    end = {"seed": seed, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": RATE / 10}}
    if arm == "vanilla":
        train(model, {}, early, first, job, **begin)
        train(model, {}, late, second, job, **end)
        return model, tokenizer
    faded = job.work / f"faded-{seed}"
    if not (faded / "config.json").exists():
        train(model, REMOVAL | {"spread_limit": 0.05}, early, first, job, **begin)
        model.save_pretrained(faded)
        tokenizer.save_pretrained(faded)
    model = ln_free.load(str(faded))[0].float().to(job.device)
    if arm == "LN-free":
        train(model, AT_FULL_SHARE | {"spread_limit": 0.05}, late, second, job, **end)
    elif arm == "LN-free, clipped":
        with ln_free.clipped(model, CLIP):
            train(model, AT_FULL_SHARE, late, second, job, **end)
    return model, tokenizer


def run(arm: str, seed: int, job: Job) -> dict[str, float]:
    """One arm under one seed."""
    job.work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = tuned(arm, seed, job)
    model.eval()
    sets = {source: rows_of(job, source, "test", tokenizer)[: job.scaled(n, 4)] for source, n in BLOCKS.items()}
    found = {source: measured(model, blocks, tokenizer) for source, blocks in sets.items()}
    metrics = {
        "loss": found["brown"].loss, "overflow (%)": 100 * found["brown"].share,
        "manual: loss": found["debian-policy"].loss, "manual: overflow (%)": 100 * found["debian-policy"].share,
    }  # fmt: skip
    if arm != "vanilla":
        with ln_free.clipped(model, CLIP):
            kept = measured(model, sets["brown"], tokenizer)
        metrics |= {
            "clip kept: loss": kept.loss, "clip kept: overflow (%)": 100 * kept.share,
            "clip active (% of tokens)": 100 * kept.beyond(CLIP),
        }  # fmt: skip
        lines = [json.dumps(line) for source in found.values() for line in source.triggers]
        (job.work / f"overflow-{arm}-{seed}.jsonl").write_text("\n".join(lines))
    metrics["worst divisor ratio"] = min(found["brown"].worst, 1e6)
    chosen = neurons(job, tokenizer)
    return metrics | chosen.effects(model, sets["brown"][: job.scaled(8, 4)])


def neurons(job: Job, tokenizer: Any) -> Neurons:
    """The confidence neurons of the original model, chosen on texts that are trained on."""
    file = job.work / "neurons.json"
    if not file.exists():
        model = fresh(job)[0].eval()
        Neurons.chosen(model, rows_of(job, "brown", "train", tokenizer)[: job.scaled(4, 4)]).save(file)
    return Neurons.load(file)


PLAN = Plan(
    name="ln-free-smollm2",
    arms=ARMS,
    baseline="vanilla",
    metrics=(
        "loss", "overflow (%)", "manual: overflow (%)", "clip kept: loss", "clip active (% of tokens)",
        "entropy moved (%)",
    ),
    claims=(
        Claim("vanilla", "loss", 0.05, higher=False, against="LN-free"),
        Claim("LN-free", "overflow (%)", 1.0, higher=False, against="LN-free, faded only"),
        Claim("LN-free, clipped", "overflow (%)", 1.0, higher=False, against="LN-free"),
        Claim("LN-free", "entropy moved (%)", 0.5, higher=False),
    ),
    seeds=3,
    run=run,
    settings={"block": BLOCK, "rows": ROWS, "rate": RATE, "steps": [FADING, AFTER], "clip": CLIP, "blocks": BLOCKS},
)  # fmt: skip
