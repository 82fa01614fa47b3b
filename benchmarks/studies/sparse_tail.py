"""Does the sparse tail cost anything that a user would notice, and how much time does it save?

Two plans: a GPT-2 with 16,384 tokens pre-trained from nothing, and SmolLM2-135M fine-tuned on the Brown corpus until
its held-out loss turns. Arms differ in the gradient of the head alone: exact; exact again with another order of sums,
which shows what rounding alone does to a run; `tail=1e-3`; and the filter of Cut Cross-Entropy.

    python -m benchmarks.studies.sparse_tail     # tries learning rates of pre-training, with the exact gradient
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from time import process_time
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback, set_seed

import hf_xent
from benchmarks.studies import base, tail_probes
from benchmarks.studies.filters import FilterTrainer
from benchmarks.studies.plan import PILOT_SEED, WORK, Job, Plan, tuning
from hf_xent import data
from hf_xent.experiments.claims import Claim
from hf_xent.models import loading

EXACT, AGAIN, SPARSE, FILTERED = "exact", "exact, other rounding", "tail 1e-3", "filter 2^-12"
ARMS = (EXACT, AGAIN, SPARSE, FILTERED)
TUNED = (EXACT, SPARSE, FILTERED)
RULES = {SPARSE: tail_probes.TAIL, FILTERED: tail_probes.FILTER}
TAIL, BUDGETS = 1e-3, {AGAIN: 5 << 20}
METRICS = ("loss", "rare_loss", "rare_mass", "rare_norm", "noise", "bias", "columns", "time", "time in float32")
PRETRAINING, FINETUNING = "sparse-tail-pretraining", "sparse-tail-finetuning"
SOURCES = (*base.SOURCES, "brown")


@dataclass(frozen=True)
class Setting:
    """One of the two trainings."""

    steps: int
    rows: int  # blocks in a step
    length: int  # tokens of a block
    rate: float
    test_rows: int
    marks: tuple[float, ...]  # the shares of the steps after which the model is measured, the last 1
    schedule: str = "cosine"
    epochs: int = 1
    probes: int = 6  # batches for the noise, and for the times

    def pilot(self) -> Setting:
        """An eighth of it, measured at the end."""
        return replace(self, steps=self.steps // 8, marks=(1.0,), test_rows=self.test_rows // 2, epochs=1)

    def tiny(self) -> Setting:
        """The smallest that goes through all the code."""
        return Setting(4, 2, 16, self.rate, 4, (0.5, 1.0), self.schedule, probes=3)


PRETRAIN = Setting(steps=320, rows=8, length=256, rate=1e-3, test_rows=100, marks=(0.05, 0.25, 0.5, 1.0))
FINETUNE = Setting(
    steps=96, rows=8, length=128, rate=2e-4, test_rows=80, marks=(0.17, 1 / 3, 2 / 3, 1.0), schedule="constant",
    epochs=3, probes=3,
)  # fmt: skip
RATES = (5e-4, 1e-3, 2e-3)
SIZE = {"n_layer": 2, "n_embd": 128, "n_head": 2}


@dataclass
class Texts:
    """Token ids."""

    train: Tensor  # [n, T]
    test: Tensor  # [m, T]
    vocabulary: int


@dataclass
class Curve(TrainerCallback):
    """Measures the model after some steps, on the trainer's own calls."""

    arm: str
    texts: Texts
    counts: Tensor
    setting: Setting
    steps: int
    bf16: bool
    measured: dict[float, dict[str, float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # of CPU, of the optimizer's steps
    _started: float = 0.0

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """The optimizer's step begins."""
        self._started = process_time()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """The optimizer's step has ended."""
        self.seconds.append(process_time() - self._started)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure, if it is time."""
        for mark in self.setting.marks:
            if state.global_step == max(1, round(mark * self.steps)):
                self.measured[mark] = self._measure(model, args.seed, mark in (self.setting.marks[0], 1.0))

    def _measure(self, model: Any, seed: int, gradients: bool) -> dict[str, float]:
        rows, n = self.setting.rows, self.setting.probes
        some = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.texts.train), generator=some)[: rows * n]
        batches = list(self.texts.train[chosen].split(rows))
        twin, rule = tail_probes.twin_of(model), RULES.get(self.arm, tail_probes.EXACT)
        found = tail_probes.held_out(twin, self.texts.test, self.counts)
        found["rare_norm"] = tail_probes.rare_norm(twin, self.counts)
        found |= tail_probes.noise(twin, batches, rule, TAIL) if gradients else {}
        found["columns"] = tail_probes.columns(twin, batches[0], TAIL) if rule == tail_probes.TAIL else float("nan")
        spent = median(self.seconds)
        is_tail = rule == tail_probes.TAIL
        found["time"] = tail_probes.time_ratio(twin, batches, TAIL, spent, self.bf16) if is_tail else 1.0
        if is_tail and gradients:
            found["time in float32"] = tail_probes.time_ratio(twin, batches, TAIL, spent, bf16=False)
        return found

    def metrics(self) -> dict[str, float]:
        """Those at the end, and by their share of the steps those before it; the time is the mean of all marks."""
        last = self.measured[1.0]
        result = dict(last) | {
            f"{name}@{mark:.2g}": value
            for mark, row in self.measured.items()
            for name, value in row.items()
            if mark != 1.0
        }
        for name in ("time", "time in float32"):
            times = [row[name] for row in self.measured.values() if name in row]
            result |= {name: sum(times) / len(times), f"{name}@1": last[name]} if times else {}
        best = min(self.measured, key=lambda mark: self.measured[mark]["loss"])
        result["best"] = best
        result["best_loss"] = self.measured[best]["loss"]
        return {name: value for name, value in result.items() if value == value}


def _blocks(parts: dict[str, Dataset], tokenizer: Any, length: int) -> dict[str, Tensor]:
    return {name: torch.tensor(data.pack(part, tokenizer, length)["input_ids"][:]) for name, part in parts.items()}


def corpus(job: Job, name: str, setting: Setting) -> tuple[Texts, Any]:
    """The token ids of a plan, made once and kept in `job.work`, and the tokenizer."""
    folder = job.work / name
    file = folder / f"blocks-{setting.length}.pt"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        parts = (
            _tiny_parts() if job.tiny else base.documents(job.text, *(SOURCES if name == PRETRAINING else ["brown"]))
        )
        if name == PRETRAINING:
            base.train_tokenizer(parts["train"]["text"][:], 300 if job.tiny else 16384).save_pretrained(folder)
        torch.save(_blocks(parts, _tokenizer(job, name), setting.length), file)
    blocks, tokenizer = torch.load(file), _tokenizer(job, name)
    return Texts(blocks["train"], blocks["test"][: setting.test_rows], len(tokenizer)), tokenizer


def _tokenizer(job: Job, name: str) -> Any:
    if name == PRETRAINING or job.tiny:
        return AutoTokenizer.from_pretrained(job.work / PRETRAINING)
    return loading.tokenizer_of("smollm2")


def _tiny_parts() -> dict[str, Dataset]:
    texts = [f"The {i} cats sat on {i * i} mats, and {i % 7} dogs ran after them." for i in range(60)]
    return {"train": Dataset.from_dict({"text": texts[:50]}), "test": Dataset.from_dict({"text": texts[50:]})}


def _model(job: Job, name: str, tokenizer: Any) -> Any:
    if name == PRETRAINING or job.tiny:
        size = {"n_layer": 1, "n_embd": 16, "n_head": 2} if job.tiny else SIZE
        return base.new_model(tokenizer, **size)
    return loading.load("smollm2", dtype="float32")[0]


def train(name: str, setting: Setting, arm: str, seed: int, job: Job) -> dict[str, float]:
    """One training run, from an arm and a seed to what is measured in it."""
    texts, tokenizer = corpus(job, name, setting)
    steps = setting.steps if job.tiny else job.scaled(setting.steps)
    set_seed(seed)
    model = _model(job, name, tokenizer)
    chosen = torch.randperm(len(texts.train), generator=torch.Generator().manual_seed(seed))
    rows = texts.train[chosen[: max(setting.rows, steps * setting.rows // setting.epochs)]]
    texts = Texts(rows, texts.test, texts.vocabulary)
    counts = tail_probes.count(rows, model.lm_head.weight.shape[0])
    options = {"tail": TAIL} if arm == SPARSE else {"memory_budget": BUDGETS[arm]} if arm in BUDGETS else {}
    config = hf_xent.XentConfig(
        output_dir=str(job.work / "trainer"), max_steps=steps, per_device_train_batch_size=setting.rows, seed=seed,
        learning_rate=setting.rate, lr_scheduler_type=setting.schedule, warmup_steps=max(1, steps // 10), bf16=True,
        weight_decay=0.1, adam_beta2=0.95, use_cpu=job.device == "cpu", logging_steps=20, save_strategy="no",
        report_to="none", disable_tqdm=True, **options,
    )  # fmt: skip
    curve = Curve(arm, texts, counts, setting, steps, bf16=True)
    kind = FilterTrainer if arm == FILTERED else hf_xent.XentTrainer
    trainer = kind(
        model, config, train_dataset=Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}),
        callbacks=[curve],
    )  # fmt: skip
    started = process_time()
    trainer.train()
    found = curve.metrics()
    return found | {"seconds": process_time() - started}


def rates(job: Job, seed: int = PILOT_SEED) -> float:
    """The rate of pre-training with the least loss; tried with both roundings, which shows what rounding does at it."""
    study, short = tuning(PRETRAINING, job), replace(PRETRAIN, marks=(1.0,))

    def loss(rate: float, arm: str) -> float:
        setting = replace(short.tiny() if job.tiny else short, rate=rate)
        return train(PRETRAINING, setting, arm, seed, job)["loss"]

    best = {arm: study.tuned(arm, RATES, partial(loss, arm=arm), higher=False) for arm in (EXACT, AGAIN)}
    return best[EXACT]


def _runner(name: str, setting: Setting) -> Any:
    def run(arm: str, seed: int, job: Job) -> dict[str, float]:
        short = setting.tiny() if job.tiny else setting.pilot() if seed >= PILOT_SEED else setting
        return train(name, short, arm, seed, job)

    return run


CLAIMS = (
    Claim(EXACT, "loss", margin=0.005, higher=False, against=SPARSE),
    Claim(EXACT, "rare_loss", margin=0.02, higher=False, against=SPARSE),
    Claim(EXACT, "loss", margin=0.005, higher=False, against=FILTERED),
    Claim(SPARSE, "time", margin=0.05, higher=False),
)
PLANS = (
    Plan(PRETRAINING, ARMS, EXACT, METRICS, CLAIMS, 3, _runner(PRETRAINING, PRETRAIN)),
    Plan(FINETUNING, TUNED, EXACT, (*METRICS, "best_loss"), CLAIMS, 3, _runner(FINETUNING, FINETUNE)),
)

if __name__ == "__main__":
    print(rates(Job(WORK / "sparse_tail")))
