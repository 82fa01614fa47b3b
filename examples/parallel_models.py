"""Translators that say all tokens at once, for noisy_translation.py --parallel: BERT over the source and masks.

A row is the source and a mask for each token of the target, which are predicted from the source alone, so no output is
told what the target's tokens before it are. The number of masks is that of the reference, also in tests, for all arms.
"""

from __future__ import annotations

from typing import Any

import mo_pairs
import noisy_models
import torch
from noisy_models import encoded
from transformers import BertConfig, BertForMaskedLM, set_seed

ARMS = {arm: options for arm, options in noisy_models.ARMS.items() if "own inputs" not in arm}
MASK = 2
FILLS = {"input_ids": mo_pairs.PAD, "labels": -100, "token_type_ids": 0, "position_ids": 0}


def new(vocabulary: int, seed: int) -> Any:
    """An encoder of four layers with random weights."""
    set_seed(seed)
    sizes = {"hidden_size": noisy_models.WIDTH, "intermediate_size": 2 * noisy_models.WIDTH, "num_hidden_layers": 4}
    more = {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": mo_pairs.PAD}
    return BertForMaskedLM(BertConfig(vocab_size=vocabulary, **sizes, **more))


def rows(tokenizer: Any, pairs: mo_pairs.Pairs) -> list[dict[str, list[int]]]:
    """Source and masks; both are numbered from 0, and told apart by their type."""
    found = []
    for source, target in pairs.items():
        ids, labels = encoded(tokenizer, source), encoded(tokenizer, target)
        both = {"input_ids": ids + [MASK] * len(labels), "labels": [-100] * len(ids) + labels}
        types = [0] * len(ids) + [1] * len(labels)
        found.append(both | {"token_type_ids": types, "position_ids": [*range(len(ids)), *range(len(labels))]})
    return found


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch, padded."""
    batch = {
        name: torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in rows], True, fill)
        for name, fill in FILLS.items()
    }
    return {**batch, "attention_mask": (batch["input_ids"] != mo_pairs.PAD).long()}


def train(*given: Any, **options: Any) -> Any:
    return noisy_models.train(*given, collate=collate, **options)


@torch.no_grad()
def translated(model: Any, tokenizer: Any, pairs: mo_pairs.Pairs) -> list[str]:
    """The likeliest token at every mask, up to the end token."""
    batch = collate(rows(tokenizer, pairs))
    wanted, found = batch.pop("labels") != -100, model.eval()(**batch).logits.argmax(-1)
    texts = [ids[mask].tolist() for ids, mask in zip(found, wanted, strict=True)]
    cut = [ids[: ids.index(mo_pairs.END)] if mo_pairs.END in ids else ids for ids in texts]
    return [text.strip() for text in tokenizer.batch_decode(cut, skip_special_tokens=True)]
