"""What removing norms does to a model, measured: losses, head attributions, first tokens, confidence.

    attribution  NMAE_h = mean |DLA - DE| / mean |DE| of attention head h, whose part of the residual stream r is c:
                 DE  = (f(r) - f(r - c)) . w_y      f the final norm: what the logit of the label loses without c
                 DLA = f'(c) . w_y                  f' the norm with its divisor frozen at r: what one usually computes
                 for the last label of each sequence. Without norms f is affine and the two are equal
    sink rate    share of heads that give the first token more than 0.3 of their attention, a mean over later queries
    first norm   |h_0| / mean |h_t>0| of the residual stream after the layer where this is largest
    neurons      of the last MLP, with the largest score |w_i| / LogitVar(w_i), w_i the neuron's output weights,
                 LogitVar(w) = variance over the vocabulary of (w_v . w) / (|w_v| |w|); and how far loss and entropy
                 move, relatively, if these neurons are held at their means over the tokens
    exploded     share of sequences in which the model overflows, as gated MLPs without norms may; they are left out
                 of all the rest

Losses, entropy and calibration are those of `hf_xent.metrics.calibration`, without logits. LogitVar is w' C w, C the
covariance of the vocabulary's unit vectors, D x D. Output projections of attention and of the last MLP are found by
running the model once; logits are those before a soft cap. Free choices, ours: queries weigh the same, the neurons are
ablated together, a head's part is without the projection's bias.

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

from ..metrics.calibration import Tokens
from ..models.contexts import check_room, eval_mode_without_autocast
from ..patching import head_of, inner_of, patched
from .norms import FakeNorm
from .structure import centered, eps_of, random_tokens

SINK = 0.3


@dataclass(frozen=True)
class Analysis:
    """Of one model on some tokens; see the module's docstring."""

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
        """Over heads."""
        heads = [value for layer in self.nmae for value in layer]
        return sum(heads) / len(heads)

    def as_dict(self) -> dict[str, Any]:
        """The fields and the mean over heads, for JSON."""
        return {**asdict(self), "mean_nmae": self.mean_nmae}


@torch.no_grad()
def analyze(model: Any, blocks: Tensor, *, batch_size: int = 8, neurons: int = 3) -> Analysis:
    """Measure a causal LM, its norms in whatever form, on token ids [N, T] without padding; leaves it as it was.

    Raises: ValueError for sequences of fewer than 3 tokens or more than the model has positions for, a model whose
    final norm is neither a LayerNorm nor an RMSNorm, or one that overflows in every sequence.
    """
    if blocks.ndim != 2 or not len(blocks) or blocks.shape[1] < 3:
        raise ValueError(f"blocks is {list(blocks.shape)}: pass token ids [N, T] with N >= 1 and T >= 3")
    if batch_size < 1 or neurons < 0:
        raise ValueError(f"batch_size is {batch_size} and neurons {neurons}: choose at least 1 and 0")
    check_room(model, blocks.shape[1], "length")
    with _measuring(model):
        anatomy = Anatomy.of(model)
        given = blocks.to(next(model.parameters()).device)
        states = (model(input_ids=ids, use_cache=False).logits.hidden for ids in given.split(batch_size))
        blocks = given[torch.cat([hidden.flatten(1).isfinite().all(1) for hidden in states])]
        if not len(blocks):
            raise ValueError(f"model overflows in each of {len(given)} sequences: there is nothing to analyze")
        parts = blocks.split(batch_size)
        tokens, ablated, seen = Tokens(), Tokens(), Passes(anatomy)
        for ids in parts:
            with seen.watched(model):
                tokens.add(model, ids)
            seen.add(ids, model)
        chosen = confidence_neurons(anatomy.mlp, head_of(model).weight, neurons)
        with _ablated(anatomy.mlp, chosen, seen.activations / blocks.numel()):
            for ids in parts:
                ablated.add(model, ids)
    before, after = tokens.summary(), ablated.summary()
    return Analysis(
        **before,
        **seen.summary(),
        neurons=tuple(chosen.tolist()),
        neuron_loss=_change(before["loss"], after["loss"]),
        neuron_entropy=_change(before["entropy"], after["entropy"]),
        exploded=1 - len(blocks) / len(given),
    )


def _change(before: float, after: float) -> float:
    """Relative; of nothing that stays nothing, none."""
    return after / before - 1 if before else math.inf if after else 0.0


@contextmanager
def _measuring(model: Any) -> Iterator[None]:
    """In evaluation mode, attention weights computed, logits lazy, without a trainer's autocast; then as before."""
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
    """In here the adapters of linear layers are in their weights, which are what they were afterwards, bit for bit."""
    embedded: Any = model.get_input_embeddings()  # type: ignore[operator]  # every transformers model has it
    modules: Iterator[Any] = model.modules()
    layers = [
        m
        for m in modules
        if type(getattr(m, "base_layer", None)) in (nn.Linear, Conv1D)
        and not (m.merged or m.disable_adapters)
        and m.base_layer.weight is not getattr(embedded, "weight", None)  # a tied head's, which both would take
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


@dataclass(frozen=True)
class Anatomy:
    """The modules that measurements hook."""

    final: nn.Module  # makes the head's input: a norm, or an identity where there is none
    center: bool
    attentions: list[tuple[nn.Module, nn.Module]]  # (attention, its output projection), by layer
    mlp: nn.Module  # output projection of the last one

    @classmethod
    def of(cls, model: Any) -> Anatomy:
        """Found by one run over a few tokens. Raises: as `analyze`."""
        head, ids = head_of(model), random_tokens(model, 1, 5)
        linears: list[nn.Module] = []
        attentions: list[tuple[nn.Module, nn.Module]] = []
        last: list[tuple[nn.Module, Tensor, Tensor]] = []

        adapted = [m for m in model.modules() if getattr(m, "base_layer", None) is head]
        parts = {head, *(part for m in adapted for part in m.modules())}

        def watch(module: nn.Module, args: Any, output: Any) -> None:
            if module in parts:
                return
            if isinstance(module, (nn.Linear, Conv1D)):
                linears.append(module)
            if isinstance(output, tuple) and len(output) > 1 and _is_attention(output[1], ids.shape[1]):
                attentions.append((module, linears[-1]))
            if args and isinstance(output, Tensor) and not list(module.children()):
                last[:] = [(module, args[0], output)]

        handles = [module.register_forward_hook(watch) for module in model.modules()]
        try:
            model(input_ids=ids)
        finally:
            for handle in handles:
                handle.remove()
        if not attentions:
            raise ValueError(f"model is a {type(model).__name__}, in which no attention weights were met")
        final, x, y = last[0]
        if isinstance(final, FakeNorm):
            return cls(final, False, attentions, linears[-1])
        center = False if x is y else centered(final, x, y)
        if center is None:
            raise ValueError(f"the final norm is a {type(final).__name__}: LayerNorm and RMSNorm are analyzed")
        return cls(final, center, attentions, linears[-1])

    def frozen(self, r: Tensor, c: Tensor) -> Tensor:
        """What the final norm, its divisor frozen at r [..., D], makes of a part c [..., D] of r."""
        norm: Any = self.final
        if isinstance(norm, FakeNorm):
            sigma = norm.divisor(norm.spread(r), norm.shares[0])
            return norm.affine(c, sigma) - (0 if norm.bias is None else norm.bias)
        if isinstance(norm, nn.Identity):
            return c
        r, c = (x - x.mean(-1, keepdim=True) if self.center else x for x in (r, c))
        weight = norm._parameters.get("weight")
        scaled = c * (r.float().square().mean(-1, keepdim=True) + eps_of(norm)).rsqrt()
        return scaled if weight is None else scaled * weight


def _is_attention(weights: Any, length: int) -> bool:
    return isinstance(weights, Tensor) and weights.ndim == 4 and tuple(weights.shape[-2:]) == (length, length)


class Passes:
    """What hooks see on the way: parts of the residual stream, attention to the first token, activations."""

    def __init__(self, anatomy: Anatomy):
        self.anatomy, self.activations = anatomy, torch.zeros(())
        self.inputs: dict[nn.Module, Tensor] = {}  # of projections and the final norm, in the pass under way
        self.weights: dict[nn.Module, Tensor] = {}  # of attention
        self.layers: list[Tensor] = []
        self.effects: list[tuple[Tensor, Tensor]] = []  # |DLA - DE| and |DE|, [layers, heads] each
        self.sinks: list[Tensor] = []  # [layers, heads]
        self.norms: list[Tensor] = []  # [2, layers]
        self.rows: list[int] = []

    @contextmanager
    def watched(self, model: Any) -> Iterator[None]:
        """Hooks on."""
        modules = [self.anatomy.final, self.anatomy.mlp, *(out for _, out in self.anatomy.attentions)]
        handles = [m.register_forward_pre_hook(lambda m, args: self.inputs.update({m: args[0]})) for m in modules]
        for attention, _ in self.anatomy.attentions:
            handles.append(attention.register_forward_hook(lambda m, _, out: self.weights.update({m: out[1]})))
        stem: Any = inner_of(model).base_model  # not what PEFT calls so
        handles.append(stem.register_forward_pre_hook(_ask_for_layers, with_kwargs=True))
        handles.append(stem.register_forward_hook(lambda _, __, out: self.layers.extend(out.hidden_states[1:-1])))
        self.layers.clear()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, ids: Tensor, model: Any) -> None:
        """Sum up the pass over a batch [B, T]."""
        r = self.inputs[self.anatomy.final]
        activations = self.inputs[self.anatomy.mlp]
        self.activations = self.activations.to(activations.device) + activations.flatten(0, -2).float().sum(0)
        sizes = torch.stack([h.float().norm(dim=-1).mean(0) for h in (*self.layers, r)])  # [layers, T]
        weights = torch.stack([self.weights[attention] for attention, _ in self.anatomy.attentions])  # [L, B, H, T, T]
        self.norms.append(torch.stack([sizes[:, 0], sizes[:, 1:].mean(1)]))
        self.sinks.append(weights[..., 1:, 0].float().mean((1, 3)))
        label = head_of(model).weight[ids[:, -1]].float()  # [B, D]
        errors, effects = [], []
        for (_, projection), heads in zip(self.anatomy.attentions, weights.transpose(1, 2), strict=True):
            exact, direct = self._effects(projection, len(heads), r[:, -2], label)
            errors.append((direct - exact).abs().mean(0))
            effects.append(exact.abs().mean(0))
        self.effects.append((torch.stack(errors), torch.stack(effects)))
        self.rows.append(len(ids))

    def _effects(self, projection: nn.Module, heads: int, r: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """DE and DLA [B, heads] at the last position that predicts."""
        x = self.inputs[projection][:, -2].flatten(1)  # [B, heads * width]
        single = torch.eye(heads, device=x.device).repeat_interleave(x.shape[1] // heads, 1).to(x)
        c = projection(x[:, None] * single) - projection(torch.zeros_like(x))[:, None]  # [B, heads, D]
        r, label = r[:, None], label[:, None]
        exact = self.anatomy.final(r) - self.anatomy.final(r - c)
        return (exact.float() * label).sum(-1), (self.anatomy.frozen(r, c).float() * label).sum(-1)

    def summary(self) -> dict[str, Any]:
        """Fields of `Analysis`."""
        share = torch.tensor(self.rows, dtype=torch.float32) / sum(self.rows)
        error, effect = (sum(s * x[i].cpu() for s, x in zip(share, self.effects, strict=True)) for i in (0, 1))
        sink = sum(s * x.cpu() for s, x in zip(share, self.sinks, strict=True))
        first, others = sum(s * x.cpu() for s, x in zip(share, self.norms, strict=True))
        return {
            "nmae": tuple(tuple(row) for row in (error / effect).where(error != 0, 0.0).tolist()),  # a head without any
            "sink_rate": float((sink > SINK).float().mean()),
            "first_norm": float((first / others).max()),
        }


def _ask_for_layers(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "output_hidden_states": True}


def confidence_neurons(projection: nn.Module, head: Tensor, count: int) -> Tensor:
    """Indices of the neurons with the largest scores, of an MLP's output projection and the head's weight [V, D].

    A neuron without output weights has no score. Raises: ValueError for more neurons than there are.
    """
    weight: Any = projection.weight
    weight = (weight.T if isinstance(projection, nn.Linear) else weight).detach().double()  # [neurons, D]
    unit = torch.nn.functional.normalize(head.detach().double(), dim=-1)
    covariance = unit.T @ unit / len(unit) - torch.outer(unit.mean(0), unit.mean(0))
    size = weight.norm(dim=-1)
    spread = ((weight @ covariance) * weight).sum(-1) / size.square()
    score = (size / spread).where(size != 0, -math.inf)
    if count > len(score):
        raise ValueError(f"neurons is {count}, but the last MLP has {len(score)}")
    return score.topk(count).indices


@contextmanager
def _ablated(projection: nn.Module, neurons: Tensor, means: Tensor) -> Iterator[None]:
    """Neurons held at their means, on the way into the output projection."""

    def hold(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].clone()
        x[..., neurons] = means[neurons].to(x)
        return (x, *args[1:])

    handle = projection.register_forward_pre_hook(hold)
    try:
        yield
    finally:
        handle.remove()
