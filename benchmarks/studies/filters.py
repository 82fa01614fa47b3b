"""Cross-entropy whose head's gradient is filtered as Cut Cross-Entropy filters it, in plain torch, for comparisons.

Logits are computed in tiles of 128 tokens and 128 columns, the columns sorted by their mean logit. A tile is skipped in
the backward pass if it holds no gradient of a logit, |p - 1_y|, of at least `threshold`: neither the hidden states nor
the head's rows get its share. The authors' kernels take 2^-12 for bfloat16, and test before the division by the number
of tokens, as is done here (Wijmans et al. 2024, arXiv:2411.09009, section 4.3, and the code beside it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

TILE, THRESHOLD, ROWS = 128, 2.0**-12, 256


class _Filtered(torch.autograd.Function):
    """The mean cross-entropy; gradients are computed with it, a few hundred tokens at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, threshold: float) -> Tensor:
        order = (weight.float() @ hidden.float().mean(0)).argsort()  # the mean logit is that of the mean hidden state
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        head, columns = weight[order], place[labels]
        total, grad_hidden = hidden.new_zeros((), dtype=torch.float32), torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=torch.float32)
        for h, y, out in zip(hidden.split(ROWS), columns.split(ROWS), grad_hidden.split(ROWS), strict=True):
            z = (h @ head.T).float()
            total += F.cross_entropy(z, y, reduction="sum")
            dz = z.softmax(-1)
            dz[torch.arange(len(y)), y] -= 1
            dz = filtered(dz, threshold).div_(len(labels)).to(hidden.dtype)
            out.copy_(dz @ head)
            grad_head += dz.T @ h
        grad_weight = torch.empty_like(weight)
        grad_weight[order] = grad_head.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total / len(labels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], grad_weight * grads[0], None, None


def filtered(dz: Tensor, threshold: float) -> Tensor:
    """Gradients of logits [N, V], the tiles without one of `threshold` or more set to 0."""
    rows, columns = dz.shape
    padded = F.pad(dz, (0, -columns % TILE, 0, -rows % TILE))
    tiles = padded.view(len(padded) // TILE, TILE, -1, TILE)
    tiles.mul_((tiles.abs().amax((1, 3), keepdim=True) >= threshold).to(dz.dtype))
    return padded[:rows, :columns]


def filtered_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """The mean cross-entropy of hidden [N, D], weight [V, D] and labels [N], with the filter's gradient."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    result: Tensor = _Filtered.apply(hidden, weight, labels, threshold)
    return result


def loss_of(model: Any, ids: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """The loss of a causal language model on token ids [B, T], its head's gradient filtered."""
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    return filtered_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, ids[:, 1:].flatten(), threshold)


class FilterTrainer(Trainer):
    """transformers' trainer, its loss in training replaced by `loss_of`."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The mean over the tokens of a batch, under the autocast that the options ask for."""
        ids = inputs["input_ids"]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.args.bf16):
            return loss_of(model, ids)
