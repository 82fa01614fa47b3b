"""Detectors of machine text that are not trained: scores of SmolLM2's statistics, of every text once, kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.studies.base import new_model, train_tokenizer
from benchmarks.studies.plan import Job
from hf_xent import detection
from hf_xent.models import loading

DETECTORS = {"loss": "loss", "Fast-DetectGPT": "fast_detect", "Binoculars": "binoculars"}
"""Arm -> score of `hf_xent.detection`, all in one pass."""


def pair(job: Job, texts: list[str]) -> tuple[Any, Any, Any]:
    """SmolLM2, the same pre-trained further (machine_texts.py), and their tokenizer; tiny models for tests."""
    if job.tiny:
        tokenizer = train_tokenizer(texts, 300)
        torch.manual_seed(0)
        one, two = (new_model(tokenizer, n_layer=1, n_embd=16, n_head=2) for _ in range(2))
        return one.eval(), two.eval(), tokenizer
    model, tokenizer = loading.load("smollm2", dtype=torch.bfloat16)
    other, _ = loading.load(str(job.work / "continued"), dtype=torch.bfloat16)
    return model.to(job.device), other.to(job.device), tokenizer


def detector_scores(arm: str, job: Job, texts: dict[str, dict[str, list[str]]]) -> Callable[[list[str]], np.ndarray]:
    """Callable: texts -> the score of each, a larger one for generated text; no text is scored twice."""
    file = job.work / "detector-scores.jsonl"
    score = detection.get(DETECTORS[arm])

    def of(asked: list[str]) -> np.ndarray:
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        kept: dict[str, list[float]] = dict(map(json.loads, lines))
        missing = sorted(set(asked) - kept.keys())
        if missing:
            model, other, tokenizer = pair(job, missing)
            options = {"reference": other, "batch_size": 32, "max_tokens": 96, "progress": False}
            scorer = detection.TextScorer(model, tokenizer, tuple(DETECTORS.values()), **options)
            for start in range(0, len(missing), 512):
                part = missing[start : start + 512]
                rows = zip(*scorer(part).values(), strict=True)
                kept |= (found := {text: [float(x) for x in row] for text, row in zip(part, rows, strict=True)})
                with file.open("a", encoding="utf-8") as out:
                    out.write("".join(json.dumps(item) + "\n" for item in found.items()))
        column = list(DETECTORS).index(arm)
        return score.oriented(np.array([kept[text][column] for text in asked]))

    return of
