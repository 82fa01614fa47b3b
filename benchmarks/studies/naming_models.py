"""Models of the task of naming.py: learning it, and what is measured of a policy against a program's truth.

calibration error    over ten bins of q = sigmoid(beta Delta), the share of pairs times |mean of q - mean known p|
squared error        the mean of (q - p)^2
accuracy             of the sign of Delta, on pairs whose utilities differ
utility              the mean of u over samples at temperature 1 for held-out prompts
wins                 the share of these samples that have a higher u than the reference's sample, ties counting half
KL                   the mean of log policy(y) - log reference(y) over the policy's samples, nats an answer
"""

from __future__ import annotations

import copy
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, GPT2Config, GPT2LMHeadModel, set_seed

import hf_xent
from benchmarks.studies import naming
from benchmarks.studies.plan import Job
from hf_xent.generation import sampling
from hf_xent.models.padding import padded

SIZE = {"n_layer": 3, "n_embd": 64, "n_head": 4, "n_positions": 128}
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BINS = 10
CONFIDENCES = tuple(f"confidence {0.5 + b / 10:.1f} to {0.6 + b / 10:.1f}" for b in range(5))


def rows_of(lessons: list[tuple[str, str]], tokenizer: Any) -> Dataset:
    """Token ids, and labels without those of the prompts."""
    rows = []
    for request, text in lessons:
        before, after = tokenizer(request)["input_ids"], tokenizer(f"{text} {naming.END}")["input_ids"]
        rows.append({"input_ids": before + after, "labels": [-100] * len(before) + after})
    return Dataset.from_list(rows)


LESSONS = {"writer": (38_400, 0.0), "judge": (51_200, 0.7)}
"""Model -> the number of lessons, and the share of them that are verdicts; the judge begins as the writer."""


def base(job: Job, name: str, rate: float = 4e-3) -> Any:
    """A small GPT-2 that has learnt the task from mixed answers, and a judge from verdicts; trained once and kept."""
    folder = job.work / f"base-{name}-{job.device}-{job.budget:g}"
    if (folder / "config.json").exists():
        return GPT2LMHeadModel.from_pretrained(folder).to(job.device)
    tokenizer = naming.tokenizer()
    set_seed(0)
    size = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 128} if job.tiny else SIZE
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    if name == "judge":
        model = base(job, "writer")
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **ends, **size, **DROPOUT))
    lessons, judged = LESSONS[name]
    arguments = hf_xent.XentConfig(
        output_dir=str(folder / "run"), num_train_epochs=1, per_device_train_batch_size=64, learning_rate=rate,
        warmup_steps=50, lr_scheduler_type="linear", weight_decay=0.01, logging_steps=50, save_strategy="no",
        report_to="none", use_cpu=job.device == "cpu", bf16=False, disable_tqdm=True,
        adam_beta2=0.98,
    )  # fmt: skip
    rows = rows_of(naming.lessons(job.scaled(lessons, tiny=64), lessons, judged), tokenizer)
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    hf_xent.XentTrainer(model, arguments, train_dataset=rows, data_collator=collator).train()
    hf_xent.unpatch(model).save_pretrained(folder)
    return GPT2LMHeadModel.from_pretrained(folder).to(job.device)  # as later runs get it


@torch.no_grad()
def logprobs(model: Any, requests: list[list[int]], answers: list[list[int]], batch: int = 256) -> Tensor:
    """log p(answer | request) [n], sums over tokens."""
    sums = []
    for start in range(0, len(requests), batch):
        part = slice(start, start + batch)
        whole = [before + after for before, after in zip(requests[part], answers[part], strict=True)]
        ids, mask = padded(whole, device=model.device)
        starts = torch.tensor([len(before) for before in requests[part]], device=ids.device)
        inside = mask.bool() & (torch.arange(ids.shape[1], device=ids.device) >= starts[:, None])
        labels = ids.masked_fill(~inside, -100)[:, 1:]
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
        sums.append(-loss.view_as(labels).double().sum(1).cpu())
    return torch.cat(sums)


class Examiner:
    """Measures policies against one reference.

    Args:
        reference: The model before preference training.
        test: Pairs with their known probabilities.
        validation: Pairs with votes.
        beta: Of the loss.
        samples: How many answers for each held-out prompt.
        seed: Of the samples.
    """

    def __init__(self, reference: Any, test: list, validation: list, beta: float, samples: int, seed: int):
        self.reference, self.beta, self.seed = copy.deepcopy(reference).eval(), beta, seed
        self.tokenizer, self.test, self.validation = naming.tokenizer(), test, validation
        self.before = {id(rows): self._margins(self.reference, rows) for rows in (test, validation) if rows}
        self.requests = [request for request in naming.prompts(3) for _ in range(samples)]
        self.baseline = self._utilities(self._sampled(self.reference))

    def _margins(self, model: Any, rows: list) -> Tensor:
        requests, first, second = (self._ids([row[name] for row in rows]) for name in ("prompt", "first", "second"))
        ends = [[self.tokenizer.eos_token_id]] * len(rows)
        first, second = ([a + b for a, b in zip(side, ends, strict=True)] for side in (first, second))
        return logprobs(model, requests, first) - logprobs(model, requests, second)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts)["input_ids"]

    def _sampled(self, model: Any) -> list[list[int]]:
        options = {"tokens": naming.LONGEST, "seed": self.seed, "temperature": 1.0}
        return sampling.responses(model, self._ids(self.requests), **options)

    def _utilities(self, answers: list[list[int]]) -> list[int]:
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [naming.utility(*pair) for pair in zip(self.requests, texts, strict=True)]

    def margins(self, model: Any, rows: list) -> Tensor:
        """beta Delta of rows that the examiner was made with."""
        return self.beta * (self._margins(model, rows) - self.before[id(rows)])

    def validated(self, model: Any) -> float:
        """The mean log loss of sigmoid(beta Delta) on the votes of the validation pairs."""
        votes = torch.tensor([mean(row["votes"]) for row in self.validation]).double()
        z = self.margins(model, self.validation)
        return F.binary_cross_entropy_with_logits(z, votes).item()

    def judged(self, model: Any) -> dict[str, float]:
        """How well beta Delta says the known probability of the test pairs."""
        p, z = torch.tensor([row["p"] for row in self.test]).double(), self.margins(model, self.test)
        differ = p != 0.5
        right = ((z > 0) == (p > 0.5))[differ].double().mean().item()
        return calibration(z.sigmoid(), p) | {"accuracy": right, "margin size": z.abs().mean().item()}

    def answered(self, model: Any) -> dict[str, float]:
        """The quality of samples, and how far the policy has gone from the reference."""
        answers = self._sampled(model)
        utilities = self._utilities(answers)
        wins = [(a > b) + (a == b) / 2 for a, b in zip(utilities, self.baseline, strict=True)]
        requests = self._ids(self.requests)
        gone = logprobs(model, requests, answers) - logprobs(self.reference, requests, answers)
        tokens = mean(len(each) for each in answers)
        return {"utility": mean(utilities), "wins": mean(wins), "KL": gone.mean().item(), "tokens": tokens}


def calibration(q: Tensor, p: Tensor) -> dict[str, float]:
    """Calibration error and squared error of predictions, and a curve over five bins of confidence."""
    bins = (q * BINS).long().clamp(max=BINS - 1)
    gaps = [abs((q - p)[bins == b].sum().item()) / len(q) for b in range(BINS)]
    found = {"calibration error": sum(gaps), "squared error": (q - p).square().mean().item()}
    confidence, known = torch.where(q >= 0.5, q, 1 - q), torch.where(q >= 0.5, p, 1 - p)
    bins = ((confidence - 0.5) * 10).long().clamp(max=4)
    for b, name in enumerate(CONFIDENCES):
        inside = bins == b
        if inside.any():
            found |= {f"{name}: share": inside.double().mean().item()}
            found |= {f"{name}: said": confidence[inside].mean().item(), f"{name}: known": known[inside].mean().item()}
    return found
