"""Measures of what the removal of norms changes in a model: losses, head attributions, first tokens, confidence.

    attribution  NMAE_h = mean |DLA - DE| / mean |DE| of attention head h, whose part of the residual stream r is c:
                 DE  = (f(r) - f(r - c)) . w_y      f the final norm: by how much c raises the logit of the label
                 DLA = f'(c) . w_y                  f' the norm with its divisor frozen at r: the usual approximation
                 for the last label of each sequence. Without norms f is affine and the two are equal
    sink rate    share of heads that give the first token more than 0.3 of their attention, a mean over later queries
    first norm   |h_0| / mean |h_t>0| of the residual stream after the layer where this is largest
    neurons      of the last MLP, with the largest score |w_i| / LogitVar(w_i), w_i the neuron's output weights,
                 LogitVar(w) = variance over the vocabulary of (w_v . w) / (|w_v| |w|); and how far loss and entropy
                 move, relatively, if these neurons are held at their means over the tokens
    exploded     share of sequences in which the model overflows, as gated MLPs without norms may; all other measures
                 leave them out

Losses, entropy and calibration are computed without logits (`hf_xent.ln_free.tokens`). Output projections of
attention and of the last MLP are found by running the model once; logits are those before a soft cap. Our choices:
all queries have the same weight, the neurons are ablated together, a head's part excludes the projection's bias.

Source: Baroni et al. 2025, arXiv:2507.02559; neurons as Stolfo et al. 2024, arXiv:2406.16254, score them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..models.anatomy import check_room
from ..models.contexts import eval_mode_without_autocast
from ..patching import head_of, patched
from .neurons import confidence_neurons, held_at_means
from .passes import Parts, Passes
from .tokens import Tokens


@dataclass(frozen=True)
class Analysis:
    """The measures of one model on some tokens; see the module's docstring."""

    loss: float  # nats per token, as the next three
    median: float
    p95: float
    p99: float
    entropy: float  # nats
    accuracy: float
    ece: float
    nmae: tuple[tuple[float, ...], ...]  # [layers][heads]
    sink_rate: float
    first_norm: float  # relative to the other tokens
    neurons: tuple[int, ...]
    neuron_loss: float  # relative change when they are ablated
    neuron_entropy: float
    exploded: float  # share of sequences

    @property
    def mean_nmae(self) -> float:
        """The mean of `nmae` over heads."""
        heads = [value for layer in self.nmae for value in layer]
        return sum(heads) / len(heads)

    def as_dict(self) -> dict[str, Any]:
        """The fields and the mean over heads, for JSON."""
        return {**asdict(self), "mean_nmae": self.mean_nmae}


@torch.no_grad()
def analyze(model: Any, blocks: Tensor, *, batch_size: int = 8, neurons: int = 3) -> Analysis:
    """Measures a causal LM with its norms in any form; the model is not changed.

    Args:
        model: A causal LM of transformers.
        blocks: Token ids [N, T] without padding, T >= 3.
        batch_size: Number of sequences in a forward pass.
        neurons: Number of confidence neurons that are ablated.

    Returns:
        Losses in nats per token, and the other measures of the module's docstring.

    Raises:
        ValueError: Sequences of fewer than 3 tokens or more than the model has positions for, a model whose final norm
            is neither a LayerNorm nor an RMSNorm, or one that overflows in every sequence.
    """
    if blocks.ndim != 2 or not len(blocks) or blocks.shape[1] < 3:
        raise ValueError(f"blocks is {list(blocks.shape)}: pass token ids [N, T] with N >= 1 and T >= 3")
    if batch_size < 1 or neurons < 0:
        raise ValueError(f"batch_size is {batch_size} and neurons {neurons}: choose at least 1 and 0")
    check_room(model, blocks.shape[1], "length")
    with _measuring(model):
        parts = Parts.of(model)
        sequences = blocks.to(next(model.parameters()).device)
        states = (model(input_ids=ids, use_cache=False).logits.hidden for ids in sequences.split(batch_size))
        blocks = sequences[torch.cat([hidden.flatten(1).isfinite().all(1) for hidden in states])]
        if not len(blocks):
            raise ValueError(f"model overflows in each of {len(sequences)} sequences: there is nothing to analyze")
        batches = blocks.split(batch_size)
        tokens, ablated, passes = Tokens(), Tokens(), Passes(parts)
        for ids in batches:
            with passes.watched(model):
                tokens.add(model, ids)
            passes.add(ids, model)
        chosen = confidence_neurons(parts.mlp, head_of(model).weight, neurons)
        with held_at_means(parts.mlp, chosen, passes.activations / blocks.numel()):
            for ids in batches:
                ablated.add(model, ids)
    before, after = tokens.summary(), ablated.summary()
    return Analysis(
        **before,
        **passes.summary(),
        neurons=tuple(chosen.tolist()),
        neuron_loss=_change(before["loss"], after["loss"]),
        neuron_entropy=_change(before["entropy"], after["entropy"]),
        exploded=1 - len(blocks) / len(sequences),
    )


def _change(before: float, after: float) -> float:
    """The relative change; 0 from 0 to 0, and infinite from 0 to another value."""
    return after / before - 1 if before else math.inf if after else 0.0


@contextmanager
def _measuring(model: Any) -> Iterator[None]:
    """Sets evaluation mode, eager attention and lazy logits, without a trainer's autocast, until the context ends."""
    attention = model.config._attn_implementation
    with eval_mode_without_autocast(model):
        model.set_attn_implementation("eager")
        try:
            with _merged(model), patched(model, always=True):
                yield
        finally:
            model.set_attn_implementation(attention)


@contextmanager
def _merged(model: nn.Module) -> Iterator[None]:
    """Merges the adapters of linear layers until the context ends; then the weights are restored, bit for bit."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]  # every transformers model has it
    modules: Iterator[Any] = model.modules()
    layers = [
        m
        for m in modules
        if type(getattr(m, "base_layer", None)) in (nn.Linear, Conv1D)
        and not (m.merged or m.disable_adapters)
        and m.base_layer.weight
        is not getattr(embeddings, "weight", None)  # tied to the head, so a merge would change both
    ]
    before = [{name: p.detach().clone() for name, p in m.base_layer.named_parameters()} for m in layers]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer, kept in zip(layers, before, strict=True):
            layer.unmerge()
            for name, p in layer.base_layer.named_parameters():
                p.data.copy_(kept[name])  # subtracting an adapter leaves rounding
