"""Prompts whose first tokens are learned vectors: one context for all classes, and one for all negative labels.

    [SOS] [v_1] ... [v_n] [tokens of the name] [.] [EOS]        v in R^{n x D}; 2 n D numbers are learned, nothing else

The text tower reads placeholder ids in the place of the vectors, so that positions, padding and the end of the text are
where it looks for them; only the embeddings of these ids are swapped.

Source: Zhou et al. 2022, CoOp, arXiv:2109.01134; two contexts: Zhang et al., LAPT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.contexts import eval_mode
from ..models.embeddings import embedded, features, text_padding, token_embedding
from ..models.padding import padded
from ..options.ranges import check_count


class LearnedPrompts(nn.Module):
    """The features of names behind learned contexts; its only parameter is `contexts` [2, n, D].

    Args:
        model: A two-tower model, or an encoder of texts; it is not a part of this module, and no gradient of its
            parameters is computed.
        tokenizer: Its tokenizer.
        names: The names of the C classes.
        negatives: The negative labels, M.
        context: How many vectors, which start at random as CoOp's do; or a text whose tokens they start from.
        seed: Seed of the start.

    Raises:
        ValueError: No names, no negatives, no vectors, or a context that leaves no room for names.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        names: Sequence[str],
        negatives: Sequence[str],
        context: int | str = 4,
        seed: int = 0,
    ):
        super().__init__()
        if not names or not negatives:
            raise ValueError(f"names number {len(names)}, negatives {len(negatives)}: give both")
        self.outside = {"model": model}  # a dictionary, so that the model is no part of this module
        self.classes = len(names)
        table: Any = token_embedding(model)
        self.contexts = nn.Parameter(_start(tokenizer, table, context, seed).repeat(2, 1, 1))
        self.fill = tokenizer.pad_token_id or 0
        self.masked = "attention_mask" in tokenizer.model_input_names
        padding = text_padding(model, tokenizer)
        self.filled = padding["max_length"] if padding["padding"] == "max_length" else 0
        self.rows, self.before = self._prompts(tokenizer, [*names, *negatives], padding["max_length"])

    def __len__(self) -> int:
        return len(self.rows)

    def _prompts(self, tokenizer: Any, names: list[str], limit: int | None) -> tuple[list[list[int]], int]:
        """The ids of all prompts with placeholders, and how many ids stand before these."""
        count = self.contexts.shape[1]
        if limit is not None and limit <= count + 4:
            raise ValueError(f"context has {count} vectors, but prompts have {limit} tokens: leave room for names")
        texts = [f"{name}." for name in names]
        cut = None if limit is None else limit - count
        found = tokenizer(texts, return_special_tokens_mask=True, truncation=cut is not None, max_length=cut)
        special, ids = found["special_tokens_mask"], found["input_ids"]
        before = next((i for i, mark in enumerate(special[0]) if not mark), len(ids[0]))
        if before == len(ids[0]):
            raise ValueError(f"names: {names[0]!r} has no token, only special ones: choose names the tokenizer knows")
        hold = [ids[0][before]] * count  # an ordinary token: the end of the text has to be found behind the name
        return [[*row[:before], *hold, *row[before:]] for row in ids], before

    def forward(self, which: Tensor, batch_size: int = 64) -> Tensor:
        """The features of some prompts, of unit length.

        Args:
            which: Their indices [K]; negatives follow the classes.
            batch_size: Prompts in a forward pass. With several of them, the activations of each are computed again in
                the backward pass, so that their memory is that of one.

        Returns:
            [K, D'], with a gradient of the contexts where gradients are enabled.
        """
        parts = which.split(batch_size)
        with eval_mode(self.outside["model"]), _without_gradients(self.outside["model"]):
            if len(parts) == 1 or not torch.is_grad_enabled():
                return torch.cat([self._encode(part, self.contexts) for part in parts])
            again = [checkpoint(self._again, part, self.contexts, use_reentrant=False) for part in parts]
            return torch.cat(again)

    def _again(self, which: Tensor, contexts: Tensor) -> Tensor:
        """As `_encode`, also when the backward pass calls it after the modes of the model were restored."""
        with eval_mode(self.outside["model"]), _without_gradients(self.outside["model"]):
            return self._encode(which, contexts)

    def _encode(self, which: Tensor, contexts: Tensor) -> Tensor:
        model, rows = self.outside["model"], [self.rows[i] for i in which.tolist()]
        device = next(model.parameters()).device
        ids, mask = padded(rows, self.fill, device=device)
        if (gap := self.filled - ids.shape[1]) > 0:
            ids, mask = (nn.functional.pad(x, (0, gap), value=v) for x, v in ((ids, self.fill), (mask, 0)))
        with torch.no_grad():
            states = token_embedding(model)(ids)
        own = contexts[(which >= self.classes).long().to(contexts.device)].to(states.dtype)
        end = self.before + own.shape[1]
        states = torch.cat([states[:, : self.before], own.to(device), states[:, end:]], 1)
        batch = {"input_ids": ids, **({"attention_mask": mask} if self.masked else {})}
        with embedded(model, states):
            return features(model, batch)


def _start(tokenizer: Any, table: Any, context: int | str, seed: int) -> Tensor:
    """The vectors that both contexts start from [n, D], float32."""
    if isinstance(context, str):
        ids = tokenizer(context, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"context is {context!r}, which has no token: give words or a number of vectors")
        with torch.no_grad():
            return table(torch.tensor(ids, device=table.weight.device)).detach().float().clone()
    check_count("context", context, 1)
    generator = torch.Generator().manual_seed(seed)
    return (0.02 * torch.randn(context, table.embedding_dim, generator=generator)).to(table.weight.device)


@contextmanager
def _without_gradients(model: Any) -> Iterator[None]:
    """A context in which no parameter of a model asks for a gradient."""
    asked = [p for p in model.parameters() if p.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
