"""Batches whose completions are replaced by samples of the model that is trained, so that it learns from its own.

The prompt of a sequence is what precedes its first label that is predicted; what follows is sampled anew from the
model's full distribution (no truncation, no penalty), up to an end token. Which batches are replaced, and the samples,
depend on the seed, the step and the number of the batch within the step alone: torch's generators are not read, so a
resumed run repeats them. The decision is the same on all processes, the samples are not.

Source: Agarwal et al. 2024, On-Policy Distillation of Language Models, arXiv:2306.13649, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from random import Random
from typing import Any, NamedTuple

from torch.distributed.fsdp import FullyShardedDataParallel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models import unwrap_model_for_generation

from ..generation.sampling import responses
from ..models.contexts import eval_mode
from ..models.padding import padded
from ..teachers.documents import documents_of

REPLACED = (
    *("input_ids", "labels", "attention_mask", "position_ids", "seq_idx"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
)
"""What a batch of text may have; all of it is made anew."""


class Draw(NamedTuple):
    """The number of a batch, from which it follows whether it is replaced, and by what."""

    seed: int
    step: int  # optimizer steps before
    batch: int  # batches of the step before

    def replaces(self, share: float) -> bool:
        """Whether the batch is one of this share that is replaced."""
        return self._random("whether").random() < share

    def seed_of(self, process: int) -> int:
        """The seed of the samples of a process."""
        return self._random(f"process {process}").getrandbits(63)

    def _random(self, purpose: str) -> Random:
        return Random(f"{self.seed}, {self.step}, {self.batch}: {purpose}")  # of text, the same on every machine


def prompts_of(batch: Mapping[str, Any]) -> list[list[int]]:
    """The tokens before the first predicted label of every sequence of a batch that has one.

    Args:
        batch: `input_ids` and `labels` [B, T], and what tells documents apart (`hf_xent.teachers.documents`).

    Raises:
        ValueError: The batch has something that samples would not have: weights, images.
    """
    if unknown := [name for name in batch if name not in REPLACED]:
        raise ValueError(
            f"on_policy replaces a batch by samples, but it has {', '.join(unknown)}, which samples do not have: leave"
            " these columns out, or set on_policy to 0"
        )
    found = []
    for document in documents_of(batch):
        labels = batch["labels"][document.row, document.columns].tolist()
        # the first token of a sequence is predicted by none
        first = next(i for i in range(1, len(labels)) if labels[i] != -100)
        found.append(document.ids[:first].tolist())
    return found


def sampled(
    model: Any, batch: Mapping[str, Any], *, tokens: int, temperature: float, seed: int, pad: int
) -> dict[str, Any]:
    """A batch of the model's own completions of a batch's prompts; the labels are the new tokens.

    Args:
        model: A causal LM that can generate, without wrappers.
        batch: As for `prompts_of`.
        tokens: The maximum number of new tokens of a completion.
        temperature: That of the softmax which is sampled.
        seed: The seed of the samples.
        pad: The token that fills rows up.

    Returns:
        `input_ids`, `attention_mask` and `labels` [S, T'], filled up on the right, for S sequences with a label; the
        batch as it is if there is none.

    Raises:
        ValueError: As `prompts_of`, or prompt and completion have more tokens than the model has positions.
    """
    prompts = prompts_of(batch)
    if not prompts:
        return dict(batch)
    with eval_mode(model):
        new = responses(model, prompts, tokens=tokens, seed=seed, temperature=temperature)
    device = batch["input_ids"].device
    ids, mask = padded([x + y for x, y in zip(prompts, new, strict=True)], pad, device=device)
    labels, _ = padded([[-100] * len(x) + y for x, y in zip(prompts, new, strict=True)], -100, device=device)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@contextmanager
def whole(model: Any, accelerator: Any) -> Iterator[Any]:
    """A context with the model that can generate, without wrappers, its weights gathered if they are partitioned."""
    if is_deepspeed_zero3_enabled():
        with unwrap_model_for_generation(model, accelerator) as unwrapped:
            yield unwrapped
        return
    is_sharded = isinstance(model, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(model, writeback=False) if is_sharded else nullcontext():
        yield accelerator.unwrap_model(model)
