"""Is EMO more than another temperature? EMO, TaiLr, MixCE and cross-entropy at equal entropy; docs/results/emo.md.

python -m benchmarks.studies run emo --pilot --seeds 2
python -m benchmarks.studies run emo
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import exp
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import normalize
from transformers import GPT2LMHeadModel, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_xent
from benchmarks.studies import continuations
from benchmarks.studies.base import documents, new_model, train_tokenizer
from benchmarks.studies.continuations import PROMPT, distribution, surface, tempered
from benchmarks.studies.plan import PILOT_SEED, Job, Plan, tuning
from hf_xent import data
from hf_xent.experiments.claims import Claim
from hf_xent.generation import sampling
from hf_xent.models import loading
from hf_xent.patching import head_of

STEPS, ROWS, BLOCK, TEXTS, JUDGED, GREEDY, OWN = 60, 8, 256, 1000, 100, 100, 200
LOSSES = {
    "MLE": "cross_entropy",
    "EMO": "emo",
    "EMO, cost of SmolLM2": "emo",
    "EMO, cost shuffled": "emo",
    "TaiLr": "tailr:gamma=0.001, w_min=0.2",
    "MixCE": "mixce:eta=0.3",
}
START_RATE, RATES = 1.5e-3, (2.5e-4, 5e-4, 1e-3, 1.5e-3)
TEMPERATURES = (0.7, 0.8, 0.9, 1.0, 1.1)


@dataclass(frozen=True)
class Sampled:
    """What an arm samples from: a trained model, at a temperature or at the entropy of another arm."""

    model: str
    temperature: float = 1.0
    entropy_of: str | None = None


COOLED = "MLE at temperature 0.8"
ARMS = {
    "MLE": Sampled("MLE"),
    "EMO": Sampled("EMO"),
    "TaiLr": Sampled("TaiLr"),
    "MixCE": Sampled("MixCE"),
    "EMO at MLE's entropy": Sampled("EMO", entropy_of="MLE"),
    "TaiLr at MLE's entropy": Sampled("TaiLr", entropy_of="MLE"),
    "MixCE at MLE's entropy": Sampled("MixCE", entropy_of="MLE"),
    "EMO, cost of SmolLM2, at MLE's entropy": Sampled("EMO, cost of SmolLM2", entropy_of="MLE"),
    "EMO, cost shuffled, at MLE's entropy": Sampled("EMO, cost shuffled", entropy_of="MLE"),
    "MLE at temperature 0.9": Sampled("MLE", temperature=0.9),
    COOLED: Sampled("MLE", temperature=0.8),
    "EMO at the entropy of MLE at 0.8": Sampled("EMO", entropy_of=COOLED),
}
HUMAN = "human"


@dataclass(frozen=True)
class Material:
    """The tokenizer, the folder of the model of base.py (None: random weights) and the documents."""

    tokenizer: Any
    base: Path | None
    train: Dataset
    validation: Tensor  # blocks [B, BLOCK]
    test: tuple[str, ...]


@cache
def material(job: Job) -> Material:
    """Brown: 380 documents to train on, 20 to tune on, 100 to prompt from; for tests, sentences made of few words."""
    if job.tiny:
        words = list("abcdefghijklmnopqrstuvwxyz")
        picks = torch.randint(len(words), (40, 700), generator=torch.Generator().manual_seed(0)).tolist()
        texts, tokenizer, base, block = [" ".join(words[i] for i in row) for row in picks], None, None, 32
        tokenizer = train_tokenizer(texts, vocabulary=300)
        parts = {"train": texts[:10], "validation": texts[10:12], "test": texts[12:]}
    else:
        halves, base, block = documents(job.text, "brown"), job.base, BLOCK
        rest = halves["train"]["text"][:]
        parts = {"train": rest[70:], "validation": rest[:20], "test": halves["test"]["text"][:] + rest[20:70]}
        tokenizer = loading.tokenizer_of(str(job.base))
    packed = {
        name: data.pack(Dataset.from_dict({"text": parts[name]}), tokenizer, block_size=block)
        for name in ("train", "validation")
    }
    validation = torch.tensor(packed["validation"][:48]["input_ids"], device=job.device)
    return Material(tokenizer, base, packed["train"], validation, tuple(parts["test"]))


def smollm2_cost(tokenizer: Any) -> Tensor:
    """An embedding for every token: the mean of SmolLM2's unit embeddings of the tokens that spell it."""
    model, other = loading.load("smollm2", dtype=torch.float32)
    units = normalize(head_of(model).weight.detach(), dim=-1)
    spelled = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    spelled_by = other(spelled, add_special_tokens=False)["input_ids"]
    return torch.stack([units[ids].mean(0) if ids else torch.zeros_like(units[0]) for ids in spelled_by])


def loss_of(arm: str, model: Any, tokenizer: Any, job: Job) -> Any:
    """The loss of an arm: a name, or EMO with a cost of its own."""
    weight = head_of(model).weight.detach()
    if arm == "EMO, cost shuffled":
        return hf_xent.losses.EMO(cost=weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(7))])
    if arm == "EMO, cost of SmolLM2":
        return hf_xent.losses.EMO(cost=weight[:, : weight.shape[1] // 2] if job.tiny else smollm2_cost(tokenizer))
    return LOSSES[arm]


def train(arm: str, seed: int, job: Job, rate: float, steps: int) -> Any:
    """Fine-tunes the starting model under an arm's loss; the rows and their order depend on the seed alone."""
    return fine_tuned(start(job), arm, seed, job, {"learning_rate": rate, "max_steps": steps})


def start(job: Job) -> Any:
    """A fresh copy of the model that all arms start from: that of base.py after an epoch of Brown at a constant rate.

    The rate falls in the steps of each arm, so that cross-entropy still has something to gain there.
    """
    folder, found = job.work / "start", material(job)
    if not (folder / "config.json").exists():
        if found.base is None:
            set_seed(0)
            model = new_model(found.tokenizer, n_layer=1, n_embd=16, n_head=2, n_positions=PROMPT + continuations.NEW)
        else:
            model = GPT2LMHeadModel.from_pretrained(found.base, dtype=torch.float32)
        options = {"learning_rate": START_RATE, "lr_scheduler_type": "constant_with_warmup"} | (
            {"max_steps": 2} if job.tiny else {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 100}
        )
        fine_tuned(model, "MLE", PILOT_SEED - 1, job, options).save_pretrained(folder)
    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)


@cache
def loss_of_start(job: Job) -> float:
    """The validation loss of the model that all arms start from."""
    return tempered(start(job).to(job.device), material(job).validation)[0]


def fine_tuned(model: Any, arm: str, seed: int, job: Job, options: dict[str, Any]) -> Any:
    """The model after training, which goes on from a checkpoint if the options keep some."""
    shared = {
        "output_dir": str(job.work / "run"), "per_device_train_batch_size": 2 if job.tiny else ROWS,
        "lr_scheduler_type": "linear", "warmup_steps": 0.05, "weight_decay": 0.1, "adam_beta2": 0.95,
        "bf16": not job.tiny, "use_cpu": job.device == "cpu", "seed": seed, "logging_steps": 20, "save_strategy": "no",
        "save_total_limit": 1, "report_to": "none", "memory_budget": 2**26,
    }  # fmt: skip
    config, found = hf_xent.EMOConfig(**shared | options), material(job)
    loss = loss_of(arm, model, found.tokenizer, job)
    trainer = hf_xent.EMOTrainer(model, config, loss=loss, train_dataset=found.train)
    kept = get_last_checkpoint(config.output_dir) if config.save_strategy != "no" and job.work.exists() else None
    trainer.train(resume_from_checkpoint=kept)
    return hf_xent.unpatch(model).eval()


def rate(arm: str, job: Job) -> float:
    """The learning rate of a loss: least validation loss at the best temperature, in runs of the pilot's seed."""
    loss, steps = LOSSES[arm], job.scaled(STEPS, tiny=2)
    study = tuning("emo", job, {"steps": steps})

    def validated(value: float) -> float:
        model = train("EMO" if loss == "emo" else arm, PILOT_SEED, job, value, steps)
        return min(tempered(model, material(job).validation[:24], t)[0] for t in TEMPERATURES)

    return study.tuned(loss, RATES[1:2] if job.tiny else RATES, validated, higher=False)


def trained(arm: str, seed: int, job: Job) -> Any:
    """The model of an arm and a seed, in bfloat16 as it is sampled, trained once and kept."""
    folder = job.work / "models" / f"{seed}-{arm.replace(', ', '-').replace(' ', '-')}"
    if not (folder / "config.json").exists():
        train(arm, seed, job, rate(arm, job), job.scaled(STEPS, tiny=2)).save_pretrained(folder)
    dtype = torch.float32 if job.tiny else torch.bfloat16
    return GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).to(job.device).eval()


@cache
def tools(job: Job) -> tuple[continuations.Encoder, continuations.Judge]:
    """The sentence encoder and the judge."""
    if job.tiny:
        return continuations.toy_encoder, lambda prompts, texts: sum(map(len, texts)) / len("".join(prompts))
    return continuations.sentence_encoder(job.device), continuations.language_model_judge("smollm2", job.device)


@cache
def references(seed: int, job: Job) -> tuple[continuations.Windows, continuations.Windows, Tensor, Tensor]:
    """The windows of a seed, two sets, and the embeddings of the first one's prompts and human continuations."""
    found = material(job)
    among, other = continuations.windows(list(found.test), found.tokenizer, job.scaled(TEXTS, tiny=30), seed)
    embedded = (tools(job)[0](found.tokenizer.batch_decode(part)) for part in (among.prompts, among.human))
    return among, other, *embedded


def measured(samples: list[list[int]], seed: int, job: Job) -> dict[str, float]:
    """The metrics of samples that continue the prompts of a seed."""
    among, _, prompts, human = references(seed, job)
    decode, (encode, judge), judged = material(job).tokenizer.batch_decode, tools(job), job.scaled(JUDGED, tiny=4)
    texts = decode(samples)
    embedded = encode(texts)
    found = distribution(human, embedded) | surface(samples)
    bits = judge(decode(among.prompts[:judged]), texts[:judged])
    return found | {"coherence": float((embedded * prompts).sum(-1).mean()), "bits": bits}


def run(arm: str, seed: int, job: Job) -> dict[str, float]:
    """The metrics of one arm under one seed."""
    found = material(job)
    among, other, *_ = references(seed, job)
    if arm == HUMAN:
        return measured(other.human, seed, job)
    source = ARMS[arm]
    model, temperature = trained(source.model, seed, job), source.temperature
    if source.entropy_of is not None:
        other_arm = ARMS[source.entropy_of]
        target = tempered(trained(other_arm.model, seed, job), found.validation, other_arm.temperature)[1]
        temperature = sampling.temperature_at(model, found.validation, target)
    nll, entropy = tempered(model, found.validation, temperature)
    options = {"tokens": continuations.NEW, "seed": seed}
    samples = continuations.sample(model, among.prompts, temperature=temperature, **options)
    metrics = {"temperature": temperature, "perplexity": exp(nll), "entropy": entropy}
    whole = [before + new for before, new in zip(among.prompts, samples, strict=True) if len(new) == continuations.NEW]
    rows = torch.tensor(whole[:OWN], device=job.device)
    metrics["own entropy"] = tempered(model, rows, temperature, PROMPT)[1]
    if arm == source.model:
        metrics["gained"] = loss_of_start(job) - nll
        greedy = continuations.sample(model, among.prompts[: job.scaled(GREEDY, tiny=4)], temperature=0.0, **options)
        metrics["greedy rep-4"] = surface(greedy)["rep-4"]
    keep(job.work / "texts" / f"{seed}-{arm}.txt", found.tokenizer, among.prompts, samples)
    return metrics | measured(samples, seed, job)


def keep(file: Path, tokenizer: Any, prompts: list[list[int]], samples: list[list[int]]) -> None:
    """Write the samples down, to be read."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pairs = zip(tokenizer.batch_decode(prompts), tokenizer.batch_decode(samples), strict=True)
    file.write_text("\n\n".join(f"{prompt} >>> {text}" for prompt, text in pairs), encoding="utf-8")


PLANS = (
    Plan(
        "emo",
        (*ARMS, HUMAN),
        "MLE",
        ("mauve", "mauve c=1", "precision", "recall", "bits", "coherence", "distinct-2", "rep-4", "greedy rep-4",
         "perplexity", "gained", "entropy", "own entropy", "temperature"),
        (
            Claim("EMO at MLE's entropy", "mauve c=1", 0.03),
            Claim("EMO at MLE's entropy", "bits", 0.1, higher=False),
            Claim("EMO at the entropy of MLE at 0.8", "mauve c=1", 0.03, against=COOLED),
            Claim("EMO at MLE's entropy", "bits", 0.1, higher=False, against="EMO, cost shuffled, at MLE's entropy"),
        ),
        seeds=5,
        run=run,
        settings={"steps": STEPS, "tokens a step": ROWS * BLOCK, "texts": TEXTS, "losses": LOSSES, "rates": RATES},
        pilot=("MLE", "EMO at MLE's entropy", "EMO, cost shuffled, at MLE's entropy", COOLED,
               "EMO at the entropy of MLE at 0.8", HUMAN),
    ),
)  # fmt: skip
