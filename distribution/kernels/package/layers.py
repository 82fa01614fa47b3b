"""Layers without a state of their own, whose `forward` takes the place of another module's by `kernels.kernelize`."""

import torch
from torch import nn

from .losses import linear_cross_entropy


class LinearCrossEntropy(nn.Module):
    """The mean cross-entropy of `hidden @ weight.T` in nats; labels of -100 are ignored."""

    can_torch_compile = True

    def forward(self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of hidden states [..., D], a head's weight [V, D] and token ids [...]."""
        return linear_cross_entropy(hidden, weight, labels)


class HeadCrossEntropy(nn.Module):
    """The same with the weight of the module that adopts `forward`: an `nn.Linear` whose forward also takes labels."""

    can_torch_compile = True

    weight: torch.Tensor
    bias: torch.Tensor | None

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of hidden states [..., D] and token ids [...]."""
        return linear_cross_entropy(hidden, self.weight, labels, bias=self.bias)
