"""Three ways to read candidates after a source: each alone, in batches that share the source, and as prefix trees.

alone    every pair is a sequence of its own: the model's plain forward, which the others are checked against
chains   the source is read once; candidates follow its keys and values in padded batches
trees    as chains, but candidates that begin with the same tokens share them (`trees`), under a mask of four dimensions

A model of encoder and decoder reads a source by its encoder and the start token; keys and values of its
cross-attention are kept, too. Not every model takes such a mask, or continues keys and values exactly (a sliding
window, relative positions, recurrent states): a way is used only after it agreed with `alone` on a few candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

from ..generation.prefixes import cache_name, can_be_continued, kept, selected
from ..models.anatomy import check_room
from ..patching import inner_of
from .edges import add_losses
from .inputs import Encoder
from .trees import Edges, Pack, Tokens, first_tokens, packs

WAYS = ("trees", "chains", "alone")
"""The ways to read candidates, the fastest first."""
WIDTH = 64
"""Nodes of a tree: larger ones share more, but every node's attention runs over the whole tree."""

Inputs = dict[str, Tensor]


class Unreadable(Exception):
    """A way of reading does not apply to a model."""


@dataclass
class Reader:
    """The losses of all candidates after one source.

    Args:
        encoder: The model, and how texts are encoded for it.
        candidates: The tokens of U different candidates.
        way: One of `WAYS`.
        batch_tokens: The most tokens of candidates in a forward pass.
    """

    encoder: Encoder
    candidates: Sequence[Tokens]
    way: str
    batch_tokens: int = 256

    def __post_init__(self) -> None:
        self.model = self.encoder.model
        self.first = first_tokens(self.candidates)
        width = WIDTH if self.way == "trees" else 0
        self.packs = [] if self.way == "alone" else packs(self.candidates, width, self.batch_tokens)

    def __call__(self, source: Inputs) -> Tensor:
        """The sum of each candidate's losses [U], nats, float64.

        Raises: Unreadable if the way does not apply to the model; ValueError if there are too few positions.
        """
        self._check_room(source)
        if self.way == "alone":
            return torch.tensor([self._alone(source, tokens) for tokens in self.candidates], dtype=torch.float64)
        if self.way == "trees" and self.encoder.has_decoder:
            raise Unreadable("the positions of a decoder are its own")
        logits, past, states = self._prefix(source)
        sums = torch.zeros(len(self.candidates), dtype=torch.float64)
        add_losses(sums, logits, self.first)
        for pack in self.packs:
            add_losses(sums, self._follow(source, past, states, pack), pack.edges)
        return sums

    def _check_room(self, source: Inputs) -> None:
        longest = max(map(len, self.candidates))
        length = source["input_ids"].shape[1] if "input_ids" in source and not self.encoder.has_decoder else 1
        check_room(self.model, length + longest - 1, "source and candidate: the number of tokens")

    def _prefix(self, source: Inputs) -> tuple[Tensor, Any, Tensor | None]:
        """After a source (and the start token, if there is a decoder): the logits [1, V], the keys and values, and the
        states [1, S, D] of the encoder, if there is one.
        """
        if not can_be_continued(self.model):
            raise Unreadable("it has recurrent states")
        if not self.encoder.has_decoder:
            output, states = self.model(**source, use_cache=True), None
        else:
            start, seen = self._decoder_ids([[self.encoder.start]]), []
            part = inner_of(self.model).get_encoder()  # type: ignore[operator]  # every such model has it
            hook = part.register_forward_hook(lambda module, args, output: seen.append(output[0]))
            try:
                output = self.model(**source, **start, use_cache=True)
            finally:
                hook.remove()
            states = seen[0]
        past = kept(self.model, output)
        if past is None:
            raise Unreadable("it keeps other states than keys and values")
        return output.logits[:, -1], past, states

    def _follow(self, source: Inputs, past: Any, states: Tensor | None, pack: Pack) -> Tensor:
        """The logits [B, N, V] of a batch of trees after a source."""
        device, rows = self.model.device, len(pack.ids)
        ids = pack.ids.to(device)
        cache = {cache_name(self.model): selected(past, torch.zeros(rows, dtype=torch.long, device=device))}
        if states is not None:
            mask = source.get("attention_mask")
            masked = {} if mask is None else {"attention_mask": mask.expand(rows, *mask.shape[1:])}
            read = BaseModelOutput(states.expand(rows, -1, -1))
            passed: dict[str, Any] = {"decoder_input_ids": ids, "encoder_outputs": read, **masked}
        elif pack.visible is None:
            # no mask: padding is on the right, which no earlier token attends to, and some models take no longer masks
            passed = {"input_ids": ids}
        else:
            length = past.get_seq_length()
            mask = F.pad(pack.visible.to(device), (length, 0), value=True)[:, None]
            hidden = torch.zeros(mask.shape, dtype=self.model.dtype, device=device)
            hidden = hidden.masked_fill_(~mask, torch.finfo(hidden.dtype).min)
            passed = {"input_ids": ids, "attention_mask": hidden, "position_ids": pack.depths.to(device) + length}
        return self.model(**passed, **cache, use_cache=True).logits

    def _alone(self, source: Inputs, tokens: Tokens) -> float:
        """The sum of one candidate's losses, from the model's plain forward."""
        if self.encoder.has_decoder:
            inputs = {**source, **self._decoder_ids([[self.encoder.start, *tokens[:-1]]])}
            logits = self.model(**inputs, use_cache=False).logits[0]
        else:
            added = torch.tensor([tokens[:-1]], dtype=torch.long, device=self.model.device)
            shape = source["input_ids"].shape
            inputs = {
                name: F.pad(value, (0, len(tokens) - 1), value=int(name == "attention_mask"))
                if value.shape == shape  # the mask, and which tokens stand for an image
                else value
                for name, value in source.items()
            }
            inputs["input_ids"] = torch.cat([source["input_ids"], added], 1)
            logits = self.model(**inputs, use_cache=False).logits[0, shape[1] - 1 :]
        chain = torch.arange(len(tokens))
        sums = torch.zeros(1, dtype=torch.float64)
        add_losses(sums, logits, Edges(chain, torch.tensor(tokens), chain, torch.zeros_like(chain)))
        return float(sums)

    def _decoder_ids(self, ids: list[list[int]]) -> Inputs:
        return {"decoder_input_ids": torch.tensor(ids, device=self.model.device)}
