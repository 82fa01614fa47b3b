"""Fingerprints of models and tokenizers: equal if they compute the same, wherever they were loaded from."""

from __future__ import annotations

import hashlib
import json
from itertools import chain
from typing import Any

import torch


def fingerprint_model(model: Any) -> str:
    """A hash that is equal for models of equal configurations, parameters and buffers, by their contents."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:  # an offloaded tensor has no values in memory
            digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """A hash that is equal for tokenizers of equal ids; settings of the last call (truncation, padding) don't count."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state |= {"truncation": None, "padding": None}
    else:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
