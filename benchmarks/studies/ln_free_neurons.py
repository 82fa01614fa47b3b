"""Confidence neurons: neurons of the last MLP whose ablation changes the entropy through the final norm's divisor.

    candidates   the CANDIDATES neurons of the original model with the largest score, as `hf_xent.ln_free.neurons`
                 defines it, with the final norm's gain folded into the head
    effect       of holding neurons at their means over tokens:  entropy' / entropy - 1, and the same for the loss;
                 only the final residual changes, r' = r - (a - mean a) W
    direct       the effect if the final norm keeps the divisor of r; the rest acts through the divisor
    chosen       the COUNT candidates whose single ablation moves the entropy most through the divisor

Chosen once, in the original model, on other texts than the effects are measured on. Without norms there is no divisor
that depends on the token, so the rest is zero; whether the neurons have another effect is what is measured.

Source: Stolfo et al. 2024, arXiv:2406.16254; Baroni et al. 2025, arXiv:2507.02559, ablate three of them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_xent.ln_free.neurons import confidence_neurons
from hf_xent.ln_free.norms import FakeNorm
from hf_xent.ln_free.structure import eps_of
from hf_xent.patching import head_of

COUNT, CANDIDATES = 3, 16


@dataclass
class _End:
    """The last residual stream of some tokens, and the modules after it."""

    residual: Tensor  # [N, D]
    activations: Tensor  # [N, neurons]
    labels: Tensor  # [N]
    out: Tensor  # [neurons, D]
    norm: Any
    head: Tensor  # [V, D]

    def moved(self, neurons: list[int]) -> Tensor:
        """The residual with these neurons at their means."""
        a = self.activations[:, neurons]
        return self.residual - (a - a.mean(0)) @ self.out[neurons]

    def normed(self, x: Tensor, frozen: bool) -> Tensor:
        """The head's input; with the divisors of the residual itself if they are frozen."""
        if not frozen or (isinstance(self.norm, FakeNorm) and self.norm.removed):
            return self.norm(x)
        centered = isinstance(self.norm, nn.LayerNorm)
        r, x = (v - v.mean(-1, keepdim=True) if centered else v for v in (self.residual, x))
        scaled = x * (r.square().mean(-1, keepdim=True) + eps_of(self.norm)).rsqrt() * self.norm.weight
        return scaled if getattr(self.norm, "bias", None) is None else scaled + self.norm.bias

    def entropy_and_loss(self, x: Tensor, frozen: bool = False) -> tuple[float, float]:
        """Means over tokens, nats."""
        entropy = loss = 0.0
        for rows, labels in zip(self.normed(x, frozen).split(256), self.labels.split(256), strict=True):
            logp = (rows @ self.head.T).log_softmax(-1)
            entropy -= float((logp.exp() * logp).sum())
            loss -= float(logp.gather(1, labels[:, None]).sum())
        return entropy / len(x), loss / len(x)


@torch.no_grad()
def _end(model: Any, blocks: Tensor) -> _End:
    """Runs a model of the Llama or the GPT-2 kind on blocks [N, T]; blocks that overflow are left out."""
    body = getattr(model, "model", None) or model.transformer
    layers = getattr(body, "layers", None) or body.h
    norm = getattr(body, "norm", None) or body.ln_f
    projection = layers[-1].mlp.down_proj if hasattr(layers[-1].mlp, "down_proj") else layers[-1].mlp.c_proj
    seen: dict[str, list[Tensor]] = {"residual": [], "activations": []}
    hooks = [
        norm.register_forward_pre_hook(lambda _, args: seen["residual"].append(args[0][:, :-1].float())),
        projection.register_forward_pre_hook(lambda _, args: seen["activations"].append(args[0][:, :-1].float())),
    ]
    blocks = blocks.to(next(model.parameters()).device)
    try:
        for ids in blocks.split(4):
            with torch.autocast(ids.device.type, torch.bfloat16):
                body(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    residual, activations = (torch.cat(seen[name]) for name in ("residual", "activations"))
    kept = residual.isfinite().flatten(1).all(1)
    out = projection.weight.T if isinstance(projection, nn.Linear) else projection.weight
    parts = (x[kept].flatten(0, 1) for x in (residual, activations, blocks[:, 1:]))
    return _End(*parts, out.float(), norm, head_of(model).weight.float())


@dataclass
class Neurons:
    """Chosen neurons, with their effects in the original model, in per cent."""

    indices: list[int]
    others: list[int]  # as many at random, a control
    original: dict[str, float]

    @classmethod
    @torch.no_grad()
    def chosen(cls, model: Any, blocks: Tensor) -> Neurons:
        """The confidence neurons of a model with its norms."""
        end = _end(model, blocks)
        weight = end.out - end.out.mean(-1, keepdim=True) if isinstance(end.norm, nn.LayerNorm) else end.out
        projection = nn.Linear(*weight.shape, bias=False)
        projection.weight = nn.Parameter(weight.T)
        count = min(CANDIDATES, len(weight))
        candidates = confidence_neurons(projection, end.head * end.norm.weight, count).tolist()
        through = {}
        for i in candidates:
            x = end.moved([i])
            through[i] = abs(end.entropy_and_loss(x)[0] - end.entropy_and_loss(x, frozen=True)[0])
        best = sorted(candidates, key=lambda i: -through[i])[:COUNT]
        others = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))[:COUNT].tolist()
        found = cls(best, others, {})
        found.original = found.effects(model, blocks)
        return found

    @torch.no_grad()
    def effects(self, model: Any, blocks: Tensor) -> dict[str, float]:
        """What their ablation does in a model, relatively, in per cent."""
        end = _end(model, blocks)
        if not len(end.labels):
            return {}
        entropy, loss = end.entropy_and_loss(end.residual)
        x = end.moved(self.indices)
        after, direct, random = (
            end.entropy_and_loss(x), end.entropy_and_loss(x, frozen=True), end.entropy_and_loss(end.moved(self.others)),
        )  # fmt: skip
        return {
            "entropy": entropy,
            "entropy moved (%)": 100 * abs(after[0] / entropy - 1),
            "entropy moved directly (%)": 100 * abs(direct[0] / entropy - 1),
            "entropy moved by others (%)": 100 * abs(random[0] / entropy - 1),
            "loss moved (%)": 100 * (after[1] / loss - 1),
        }

    def save(self, file: Path) -> None:
        """Keep them for other runs."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, file: Path) -> Neurons:
        """Read what `save` has written."""
        return cls(**json.loads(file.read_text()))
