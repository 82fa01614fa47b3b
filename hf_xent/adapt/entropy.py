"""Entropy minimisation on a stream: the model gets surer of what it says, by the scales and shifts of its norms alone.

    loss = mean_b -sum_c q_c log q_c

q is the model's softmax. A stream on which one class is more and more often said has a low loss, too: with a large step
size the method collapses to it.

Source: Wang et al. 2021, Tent: Fully Test-time Adaptation by Entropy Minimization, arXiv:2006.10726, for BatchNorm;
that LayerNorm and others are learned likewise is a choice of this library.
Relations: `RMT` asks for agreement with a teacher and learns all parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributions import Categorical

from ..ops.statistics import widened
from .streams import Stream


@dataclass(eq=False)
class EntropyMinimization(Stream):
    """Adapts the affine parameters of normalisation layers; see the module's docstring.

        tent = EntropyMinimization(model)
        logits = tent.predict({"pixel_values": images})

    Raises:
        ValueError: The model has no normalisation layer whose parameters have gradients, and as `Stream`.
    """

    def learns(self) -> dict[str, nn.Parameter]:
        """The scales and shifts of layers whose class is called a norm."""
        return {
            f"model.{name}.{own}": parameter
            for name, layer in self.model.named_modules()
            if "Norm" in type(layer).__name__
            for own, parameter in layer.named_parameters(recurse=False)
            if parameter.requires_grad
        }

    def adapt(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The model's logits, and their mean entropy in nats."""
        logits = widened(self.model(**inputs).logits)
        return logits, Categorical(logits=logits, validate_args=False).entropy().mean()
