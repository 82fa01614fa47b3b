"""Measurements by hooks on forward passes: parts of the residual stream, attention to the first token, activations.

The formulas of the measures are in `hf_xent.ln_free.analysis`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..models.anatomy import random_tokens
from ..patching import head_of, inner_of
from .norms import FakeNorm
from .structure import centered, eps_of

SINK = 0.3
"""A head is a sink if it gives the first token more than this share of its attention."""


@dataclass(frozen=True)
class Parts:
    """The modules to which the measurements attach hooks."""

    final: nn.Module  # computes the head's input: a norm, or an identity where there is none
    center: bool  # whether the final norm subtracts the mean
    attentions: list[tuple[nn.Module, nn.Module]]  # (attention, its output projection), by layer
    mlp: nn.Module  # the output projection of the last MLP

    @classmethod
    def of(cls, model: Any) -> Parts:
        """The parts of a model, found by running it on a few tokens. Raises: ValueError, as `analyze`."""
        head, ids = head_of(model), random_tokens(model, 1, 5)
        linears: list[nn.Module] = []
        attentions: list[tuple[nn.Module, nn.Module]] = []
        last: list[tuple[nn.Module, Tensor, Tensor]] = []

        adapted = [m for m in model.modules() if getattr(m, "base_layer", None) is head]
        of_head = {head, *(part for m in adapted for part in m.modules())}

        def watch(module: nn.Module, args: Any, output: Any) -> None:
            if module in of_head:
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
            raise ValueError(
                f"model is a {type(model).__name__} whose modules return no attention weights: pass one with eager"
                " attention"
            )
        final, x, y = last[0]
        if isinstance(final, FakeNorm):
            return cls(final, False, attentions, linears[-1])
        center = False if x is y else centered(final, x, y)
        if center is None:
            raise ValueError(f"the final norm is a {type(final).__name__}: only LayerNorm and RMSNorm can be analyzed")
        return cls(final, center, attentions, linears[-1])

    def frozen(self, r: Tensor, c: Tensor) -> Tensor:
        """The image of a part c [..., D] of r [..., D] under the final norm with its divisor frozen at that of r."""
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
    """Sums over batches of what the hooks read: residual stream, attention to the first token, activations."""

    def __init__(self, parts: Parts):
        self.parts, self.activations = parts, torch.zeros(())
        self.inputs: dict[nn.Module, Tensor] = {}  # of projections and the final norm, in the current pass
        self.weights: dict[nn.Module, Tensor] = {}  # attention module -> its attention weights
        self.layers: list[Tensor] = []  # hidden states after each layer
        self.effects: list[tuple[Tensor, Tensor]] = []  # |DLA - DE| and |DE|, [layers, heads] each
        self.sinks: list[Tensor] = []  # [layers, heads]
        self.norms: list[Tensor] = []  # [2, layers]
        self.rows: list[int] = []

    @contextmanager
    def watched(self, model: Any) -> Iterator[None]:
        """Attaches the hooks; removes them when the context ends."""
        modules = [self.parts.final, self.parts.mlp, *(out for _, out in self.parts.attentions)]
        handles = [m.register_forward_pre_hook(lambda m, args: self.inputs.update({m: args[0]})) for m in modules]
        for attention, _ in self.parts.attentions:
            handles.append(attention.register_forward_hook(lambda m, _, out: self.weights.update({m: out[1]})))
        stem: Any = inner_of(model).base_model  # transformers' base model; PEFT has another attribute of this name
        handles.append(stem.register_forward_pre_hook(_ask_for_layers, with_kwargs=True))
        handles.append(stem.register_forward_hook(lambda _, __, out: self.layers.extend(out.hidden_states[1:-1])))
        self.layers.clear()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, ids: Tensor, model: Any) -> None:
        """Adds the measures of the pass over a batch [B, T]."""
        r = self.inputs[self.parts.final]
        activations = self.inputs[self.parts.mlp]
        self.activations = self.activations.to(activations.device) + activations.flatten(0, -2).float().sum(0)
        sizes = torch.stack([h.float().norm(dim=-1).mean(0) for h in (*self.layers, r)])  # [layers, T]
        weights = torch.stack([self.weights[attention] for attention, _ in self.parts.attentions])  # [L, B, H, T, T]
        self.norms.append(torch.stack([sizes[:, 0], sizes[:, 1:].mean(1)]))
        self.sinks.append(weights[..., 1:, 0].float().mean((1, 3)))
        label = head_of(model).weight[ids[:, -1]].float()  # [B, D]
        errors, effects = [], []
        for (_, projection), heads in zip(self.parts.attentions, weights.transpose(1, 2), strict=True):
            exact, direct = self._effects(projection, len(heads), r[:, -2], label)
            errors.append((direct - exact).abs().mean(0))
            effects.append(exact.abs().mean(0))
        self.effects.append((torch.stack(errors), torch.stack(effects)))
        self.rows.append(len(ids))

    def _effects(self, projection: nn.Module, heads: int, r: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """DE and DLA [B, heads] at the last position that predicts a token."""
        x = self.inputs[projection][:, -2].flatten(1)  # [B, heads * width]
        single = torch.eye(heads, device=x.device).repeat_interleave(x.shape[1] // heads, 1).to(x)
        c = projection(x[:, None] * single) - projection(torch.zeros_like(x))[:, None]  # [B, heads, D]
        r, label = r[:, None], label[:, None]
        exact = self.parts.final(r) - self.parts.final(r - c)
        return (exact.float() * label).sum(-1), (self.parts.frozen(r, c).float() * label).sum(-1)

    def summary(self) -> dict[str, Any]:
        """These fields of `Analysis`."""
        share = torch.tensor(self.rows, dtype=torch.float32) / sum(self.rows)
        error, effect = (sum(s * x[i].cpu() for s, x in zip(share, self.effects, strict=True)) for i in (0, 1))
        sink = sum(s * x.cpu() for s, x in zip(share, self.sinks, strict=True))
        first, others = sum(s * x.cpu() for s, x in zip(share, self.norms, strict=True))
        return {
            "nmae": tuple(
                tuple(row) for row in (error / effect).where(error != 0, 0.0).tolist()
            ),  # 0 if a head has no effect
            "sink_rate": float((sink > SINK).float().mean()),
            "first_norm": float((first / others).max()),
        }


def _ask_for_layers(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "output_hidden_states": True}
