"""Where a model without norms overflows: the token and the site at which its divisors leave the range.

ratio      sigma_x / sigma of a token at a site: how much too long its hidden state is for the constant divisor
overflow   a block in which a hidden state is not finite; its tokens from there on have no loss
loss       nats per token, at most log V, which is also that of tokens without one
trigger    the first token of a block whose hidden state is not finite, with the first site where its ratio is
           above FAR; a gated MLP whose input is r times too large returns r^2 times too much
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_xent.ln_free.norms import FakeNorm

FAR = 4.0


@dataclass
class Measured:
    """What `measured` finds."""

    losses: list[Tensor] = field(default_factory=list)  # [B, T - 1] each
    ratios: list[Tensor] = field(default_factory=list)  # [B, T], the largest over sites
    overflowed: list[Tensor] = field(default_factory=list)  # [B]
    triggers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """The mean, each token's at most log V."""
        return float(torch.cat(self.losses).mean())

    @property
    def share(self) -> float:
        """The share of blocks that overflow."""
        return float(torch.cat(self.overflowed).float().mean())

    @property
    def worst(self) -> float:
        """The largest finite ratio."""
        ratios = torch.cat(self.ratios) if self.ratios else torch.ones(1)
        return float(ratios.nan_to_num(0, posinf=0).max())

    def beyond(self, limit: float) -> float:
        """The share of tokens with a ratio above a limit at any site."""
        return float((~(torch.cat(self.ratios) <= limit)).float().mean())


@torch.no_grad()
def measured(model: Any, blocks: Tensor, tokenizer: Any, batch_size: int = 4) -> Measured:
    """Runs a model on blocks [N, T] in bfloat16 autocast."""
    found = Measured()
    norms = [m for m in model.modules() if isinstance(m, FakeNorm)]
    device = next(model.parameters()).device
    seen: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda m, a: seen.append(m.spread(a[0])[..., 0] / m.sigma)) for m in norms]
    try:
        for ids in blocks.to(device).split(batch_size):
            seen.clear()
            with torch.autocast(device.type, torch.bfloat16):
                output = model(input_ids=ids, use_cache=False, output_hidden_states=True)
            hidden = output.hidden_states[-1]
            logits = output.logits[:, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            most = math.log(logits.shape[-1])
            found.losses.append(nll.nan_to_num(most, posinf=most).clamp(max=most).cpu())
            found.overflowed.append(~hidden.isfinite().flatten(1).all(1).cpu())
            if norms:
                ratios = torch.stack(seen)  # [sites, B, T]
                found.ratios.append(ratios.amax(0).cpu())
                names = [name for norm in norms for name in norm.sites[:1]]
                found.triggers += _triggers(ratios, hidden.isfinite().flatten(1).all(1), ids, names, tokenizer)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _triggers(ratios: Tensor, finite: Tensor, ids: Tensor, names: list[str], tokenizer: Any) -> list[dict[str, Any]]:
    """For each block that overflows: the token that does, and where it leaves the range."""
    rows = []
    for block in (~finite).nonzero()[:, 0].tolist():
        paths = ratios[:, block]  # [sites, T]
        broken = (~paths.isfinite().all(1)).nonzero()
        last = int(broken[0]) if len(broken) else len(paths)  # the first site that is not finite
        at = paths[last - 1] if last else paths[0].nan_to_num(torch.inf)
        position = int(at.argmax())
        path = paths[:, position]
        far = (~(path < FAR)).nonzero()
        site = int(far[0]) if len(far) else len(names) - 1
        tokens = ids[block].tolist()
        rows.append({
            "position": position, "token": tokenizer.decode(tokens[position]), "site": names[site], "index": site,
            "overflows at": names[min(last, len(names) - 1)],
            "before": tokenizer.decode(tokens[max(0, position - 12) : position]),
            "path": [float(f"{x:.3g}") for x in path.nan_to_num(-1, posinf=-1).tolist()],
        })  # fmt: skip
    return rows
