"""Features of documents: a model's hidden states at the last token of each, layer by layer.

    documents = Documents(texts, tokenizer, max_length=128)
    for batch in documents.features(model, layers=(0, -1)):        layer -> features [B, D], float64, on the CPU

A document is cut after `max_length` tokens. Rows are filled up on the right whatever the tokenizer's side is, and their
lengths are known rather than read off the ids: a document that ends in the padding token, or a tokenizer that pads with
EOS, changes nothing. Layers are those of `hidden_states`: 0 is the embeddings, -1 the last layer, in most models after
the final norm.

Source: Li et al. 2025, arXiv:2509.23024: the last token that is not padding, of `hidden_states[-1]`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..options.ranges import check_count
from .anatomy import check_room
from .contexts import eval_mode_without_autocast
from .padding import padded


class Documents:
    """Documents to read under a model, as token ids.

    Args:
        texts: Texts, or lists of token ids.
        tokenizer: The tokenizer of texts; it is called with its defaults. Token ids need none.
        batch_size: Documents in a forward pass.
        max_length: Tokens after which a document is cut.

    Raises:
        ValueError: No document, one without a token, texts without a tokenizer, or a number below 1.
    """

    def __init__(
        self,
        texts: Sequence[str] | Sequence[Sequence[int]],
        tokenizer: Any = None,
        *,
        batch_size: int = 16,
        max_length: int = 512,
    ):
        check_count("batch_size", batch_size, 1)
        check_count("max_length", max_length, 1)
        rows: list[Any] = list(texts)
        if any(isinstance(row, str) for row in rows):
            if tokenizer is None:
                raise ValueError("texts need a tokenizer: pass it, or lists of token ids")
            rows = tokenizer(rows, verbose=False)["input_ids"]
        self.rows = [list(row[:max_length]) for row in rows]
        self.batch_size, self.max_length = batch_size, max_length
        empty = [i for i, row in enumerate(self.rows) if not row]
        if empty or not rows:
            raise ValueError(f"texts number {len(rows)}, without tokens are {empty[:5]}: pass documents that have some")

    def __len__(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def features(self, model: Any, layers: Sequence[int] = (-1,)) -> Iterator[dict[int, Tensor]]:
        """The features of all documents, batch by batch, in evaluation mode and in the dtype of the weights.

        Args:
            model: A causal LM or an encoder of transformers, also inside PEFT's wrapper.
            layers: Which of the hidden states.

        Returns:
            An iterator of layer -> features [B, D], float64, on the CPU, in the order of the documents.

        Raises:
            ValueError: A layer that the model does not have, more tokens than it has positions, or an encoder-decoder.
        """
        check_layers(model, layers)
        check_room(model, max(map(len, self.rows)), "max_length")
        device = model.get_input_embeddings().weight.device
        one = {"logits_to_keep": 1} if _takes(model, "logits_to_keep") else {}  # logits are not read
        cache = {"use_cache": False} if _takes(model, "use_cache") else {}
        with eval_mode_without_autocast(model):
            for start in range(0, len(self.rows), self.batch_size):
                rows = self.rows[start : start + self.batch_size]
                ids, mask = padded(rows, device=device)
                output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, **one, **cache)
                last = mask.sum(1) - 1
                each = torch.arange(len(rows), device=device)
                states = output.hidden_states
                yield {layer: states[layer].to(device)[each, last].double().cpu() for layer in layers}


def check_layers(model: Any, layers: Sequence[int]) -> None:
    """Check that a model has these hidden states. Raises: ValueError, also for an encoder-decoder."""
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model is a {type(model).__name__}, an encoder and a decoder: pass one of them")
    count = config.num_hidden_layers
    if not layers or any(not -count - 1 <= layer <= count for layer in layers):
        raise ValueError(f"layers is {tuple(layers)}: choose from {-count - 1} to {count}, 0 is the embeddings")


def _takes(model: Any, option: str) -> bool:
    """Whether the forward of a model, inside PEFT's wrapper, has an option by name."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return option in inspect.signature(type(inner).forward).parameters
