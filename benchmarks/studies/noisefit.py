"""NoiseFiT: does agreement of noisy passes keep a model from confident wrong answers about what it was not taught?

Facts about invented persons (noisefit_facts.py) are fine-tuned into the GPT-2 of base.py, without its lower layers.
The model is asked in templates that training does not have, about persons with facts, with contradictory facts, and
absent ones.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, set_seed

import hf_xent
from benchmarks.studies import base
from benchmarks.studies.noisefit_facts import RELATIONS, UNKNOWN, Fact, World, world
from benchmarks.studies.plan import Job, Plan, tuning
from hf_xent import NoiseFiTTrainer, XentTrainer
from hf_xent.experiments.claims import Claim

ARMS: dict[str, tuple[type[XentTrainer], dict[str, Any]]] = {
    "cross-entropy": (XentTrainer, {}),
    "label smoothing": (XentTrainer, {"label_smoothing_factor": 0.1}),
    "NEFTune": (XentTrainer, {"neftune_noise_alpha": 5.0}),
    "cross-entropy, dropout": (XentTrainer, {}),
    "R-Drop, dropout": (NoiseFiTTrainer, {"method": "rdrop"}),
    "NoiseFiT, dropout instead of noise": (NoiseFiTTrainer, {"noise_std": 0.0}),
    "NoiseFiT, sigma 0.1": (NoiseFiTTrainer, {"noise_std": 0.1}),
    "NoiseFiT, sigma 0.2": (NoiseFiTTrainer, {"noise_std": 0.2}),
}
CLAIMED, STRONG, CONTROL = "NoiseFiT, sigma 0.1", "NoiseFiT, sigma 0.2", "NoiseFiT, dropout instead of noise"
SIZE = {"persons": 32, "epochs": 20, "rows": 32, "frozen layers": 3, "dropout of arms that have it": 0.1}
RATES, TUNING_SEED = (5e-4, 1e-3, 2e-3, 4e-3), 900
METRICS = (
    "accuracy", "consistency", "hallucination", "answered at 90 %", "AUROC", "abstention", "share error", "nll",
    "learned", "divergence", "mean divergence", "noise", "rate",
)  # fmt: skip
TEMPERATURE = 0.5


def load(job: Job, words: list[str], dropout: float) -> tuple[Any, Any]:
    """The model to fine-tune, and its tokenizer."""
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    if job.tiny:
        tokenizer = base.train_tokenizer(words, vocabulary=700)
        return base.new_model(tokenizer, n_layer=4, n_embd=48, n_head=4, **rates), tokenizer
    return AutoModelForCausalLM.from_pretrained(job.base, **rates), AutoTokenizer.from_pretrained(job.base)


def token(tokenizer: Any, answer: str) -> int:
    """The one token of an answer. Raises: ValueError if it has several."""
    ids = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"the answer {answer!r} has {len(ids)} tokens: choose words of one token")
    return int(ids[0])


def encode(rows: list[tuple[str, str]], tokenizer: Any) -> Dataset:
    """Rows of training, of which the answer and the end have labels."""
    encoded = []
    for question, answer in rows:
        prompt, end = tokenizer(question)["input_ids"], [token(tokenizer, answer), tokenizer.eos_token_id]
        encoded.append({"input_ids": prompt + end, "labels": [-100] * len(prompt) + end})
    return Dataset.from_list(encoded)


def fine_tune(arm: str, seed: int, job: Job, rate: float) -> dict[str, float]:
    """The metrics of an arm under a seed, trained with a learning rate."""
    set_seed(seed)
    made = world(seed, 8 if job.tiny else SIZE["persons"])
    dropout = SIZE["dropout of arms that have it"] if "dropout" in arm else 0.0
    model, tokenizer = load(job, [f"{q} {a}" for q, a in made.rows()] * 2, dropout)
    model.transformer.h[: SIZE["frozen layers"]].requires_grad_(False)  # those that get noise; else it grows with them
    kind, options = ARMS[arm]
    config = kind.config_class(
        output_dir=str(job.work / "run"), num_train_epochs=job.scaled(SIZE["epochs"]),
        warmup_steps=0 if job.tiny else 10, per_device_train_batch_size=SIZE["rows"], gradient_accumulation_steps=1,
        learning_rate=rate, lr_scheduler_type="cosine", seed=seed, logging_steps=1 if job.tiny else 10,
        save_strategy="no", report_to="none", bf16=not job.tiny, use_cpu=job.device == "cpu", disable_tqdm=True,
        **options,
    )  # fmt: skip
    trainer = kind(
        model, config, train_dataset=encode(made.rows(), tokenizer), data_collator=DataCollatorForSeq2Seq(tokenizer)
    )
    trainer.train()
    history = trainer.state.log_history
    logs = {name: value for entry in history for name, value in entry.items()}
    shares = [value for name, value in logs.items() if name.startswith("noise_share")]
    apart = [entry["divergence"] for entry in history if "divergence" in entry]
    kept = {"divergence": apart[-1], "mean divergence": fmean(apart)} if apart else {}
    kept |= {"noise": sum(shares) / len(shares)} if shares else {}
    return measure(hf_xent.unpatch(trainer.model).eval(), tokenizer, made) | kept | {"rate": rate}


@torch.no_grad()
def distributions(model: Any, tokenizer: Any, questions: list[str]) -> Tensor:
    """log p of the next token behind every question, [N, V]."""
    groups: dict[int, list[int]] = defaultdict(list)
    prompts = [tokenizer(question)["input_ids"] for question in questions]
    for i, prompt in enumerate(prompts):
        groups[len(prompt)].append(i)
    found = torch.empty(len(prompts), model.get_output_embeddings().weight.shape[0])
    for members in groups.values():
        for part in torch.tensor(members).split(64):
            ids = torch.tensor([prompts[i] for i in part], device=model.device)
            found[part] = model(ids, logits_to_keep=1).logits[:, -1].float().log_softmax(-1).cpu()
    return found


def asked(facts: list[Fact], kind: str = "test") -> list[str]:
    """The questions of facts in the templates of a kind, all facts in the first template, then in the next."""
    templates = [getattr(relation, kind) for relation in RELATIONS]
    return [templates[fact.relation][t].format(fact.person) for t in range(len(templates[0])) for fact in facts]


def measure(model: Any, tokenizer: Any, made: World) -> dict[str, float]:
    """The metrics of a model; docs/results/noisefit.md defines them."""
    unknown = token(tokenizer, UNKNOWN)

    def log_p(facts: list[Fact], kind: str = "test") -> Tensor:
        return distributions(model, tokenizer, asked(facts, kind))

    def targets(facts: list[Fact], rows: Tensor, answer: int = 0) -> Tensor:
        return torch.tensor([token(tokenizer, f.answers[answer]) for f in facts]).repeat(len(rows) // len(facts))

    known, taught, disputed = log_p(made.known), log_p(made.known, "taught"), log_p(made.contradicted)
    right = targets(made.known, known)
    pair = [targets(made.contradicted, disputed, i) for i in (0, 1)]
    metrics = {
        "accuracy": float(sampled(known).gather(1, right[:, None]).mean()),
        "greedy": hits(known, right),
        "learned": hits(taught, targets(made.known, taught)),
        "nll": -float(known.gather(1, right[:, None]).mean()),
        "consistency": agreement(sampled(known).chunk(len(known) // len(made.known))),
        "share error": share_error(disputed.exp(), *pair),
        "majority": hits(disputed, pair[0]),
    }
    absent = {name: log_p(getattr(made, name)) for name in ("namesakes", "new")}
    metrics |= {f"hallucination, {name}": confident(rows, unknown) for name, rows in absent.items()}
    rows = torch.cat(list(absent.values()))
    metrics |= {"hallucination": confident(rows, unknown), "abstention": hits(rows, torch.full((len(rows),), unknown))}
    return metrics | separation(answered(known, unknown), answered(rows, unknown))


def sampled(log_p: Tensor) -> Tensor:
    """The probability of every token in samples at the temperature."""
    return (log_p / TEMPERATURE).softmax(-1)


def agreement(templates: tuple[Tensor, ...]) -> float:
    """The probability that samples of the same fact in two different templates are the same token."""
    return fmean(float((one * two).sum(-1).mean()) for one, two in combinations(templates, 2))


def hits(log_p: Tensor, right: Tensor) -> float:
    """The share of rows whose likeliest token is the right one."""
    return float((log_p.argmax(-1) == right).float().mean())


def answered(log_p: Tensor, unknown: int) -> Tensor:
    """The probability of the likeliest answer other than 'unknown'."""
    p = log_p.exp()
    p[:, unknown] = 0
    return p.amax(-1)


def confident(log_p: Tensor, unknown: int) -> float:
    """The share of rows in which one answer other than 'unknown' has a probability above a half."""
    return float((answered(log_p, unknown) > 0.5).float().mean())


def share_error(p: Tensor, first: Tensor, second: Tensor, share: float = 0.75) -> float:
    """The mean total variation distance of distributions to the taught one: `share` first answer, else the second."""
    taught = torch.zeros_like(p).scatter_(1, first[:, None], share).scatter_(1, second[:, None], 1 - share)
    return float((p - taught).abs().sum(-1).mean() / 2)


def separation(known: Tensor, absent: Tensor) -> dict[str, float]:
    """How well the probability of an answer tells known facts from absent ones, whatever its scale.

    Returns:
        'AUROC', and 'answered at 90 %': the share of absent facts that get an answer if 90 % of the known ones do.
    """
    labels = [1] * len(known) + [0] * len(absent)
    bound = known.quantile(0.1)
    return {
        "AUROC": float(roc_auc_score(labels, torch.cat([known, absent]).double().numpy())),
        "answered at 90 %": float((absent >= bound).float().mean()),
    }


def tuned(arm: str, job: Job) -> float:
    """The learning rate with the best accuracy, on persons of a seed of its own.

    NoiseFiT has a rate for each sigma; the other arms of one pass or of several, with dropout or without, share one.
    """
    if job.tiny:
        return 3e-3
    several, dropout = ARMS[arm][0] is NoiseFiTTrainer, "dropout" in arm
    kinds = {(False, False): "cross-entropy", (False, True): "cross-entropy, dropout",
             (True, False): arm, (True, True): CONTROL}  # fmt: skip
    like = kinds[several, dropout]
    study = tuning("noisefit", job, SIZE)
    return study.tuned(like, RATES, lambda rate: fine_tune(like, TUNING_SEED, job, rate)["accuracy"])


def run(arm: str, seed: int, job: Job) -> dict[str, float]:
    """The metrics of an arm under a seed, which draws the persons, the facts, the order of rows and the noise."""
    return fine_tune(arm, seed, job, tuned(arm, job))


CLAIMS = (
    Claim(CLAIMED, "hallucination", 0.05, higher=False),
    Claim(CLAIMED, "AUROC", 0.03),
    Claim(CLAIMED, "accuracy", 0.03),
    Claim(STRONG, "AUROC", 0.03),
    Claim(CLAIMED, "hallucination", 0.05, higher=False, against=CONTROL),
)
SETTINGS = SIZE | {"rates": list(RATES), "tuning seed": TUNING_SEED}
PLANS = (
    Plan(
        "noisefit", tuple(ARMS), "cross-entropy", METRICS, CLAIMS, 8, run, SETTINGS,
        pilot=("cross-entropy", CONTROL, CLAIMED, STRONG),
    ),
)  # fmt: skip
