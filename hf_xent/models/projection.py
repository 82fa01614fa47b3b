"""A head between the features of a frozen encoder and its classes: a residual perceptron that starts as the identity.

h(e) = e + W_2 gelu(W_1 e + b_1) + b_2,   W_2 = 0 and b_2 = 0 at the start

head = ProjectionHead(ProjectionConfig(size=512))
model = ZeroShot(clip, centers, head)                   # the same classes as without a head, until it is trained
head.save_pretrained("head")                            # a checkpoint of its own, beside that of the encoder
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from ..options.ranges import check_count


class ProjectionConfig(PreTrainedConfig):
    """Configuration of `ProjectionHead`.

    Args:
        size: The width D of features.
        hidden_size: The width of the perceptron; half of `size`, and at least 1, if it is left out.
        initializer_range: Standard deviation of W_1 at the start.
        **kwargs: As for `transformers.PreTrainedConfig`.

    Raises:
        ValueError: A width is no whole number above 0.
    """

    model_type = "hf_xent_projection"

    def __init__(self, size: int = 512, hidden_size: int | None = None, initializer_range: float = 0.02, **kwargs: Any):
        check_count("size", size, 1)
        hidden_size = max(1, size // 2) if hidden_size is None else hidden_size
        check_count("hidden_size", hidden_size, 1)
        self.size, self.hidden_size, self.initializer_range = size, hidden_size, initializer_range
        super().__init__(**kwargs)


class ProjectionHead(PreTrainedModel):
    """The head of a frozen encoder; see the module's docstring."""

    config_class = ProjectionConfig
    main_input_name = "features"

    def __init__(self, config: ProjectionConfig):
        super().__init__(config)
        self.inner = nn.Linear(config.size, config.hidden_size)
        self.outer = nn.Linear(config.hidden_size, config.size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The last layer starts at 0, so that the head is the identity."""
        if module is self.outer:
            init.zeros_(self.outer.weight)
            init.zeros_(self.outer.bias)
        else:
            super()._init_weights(module)

    def forward(self, features: Tensor) -> Tensor:
        """Features [..., D] -> features [..., D], which are not of unit length."""
        outer: Tensor = self.outer(F.gelu(self.inner(features)))
        return features + outer

    @staticmethod
    def hub_usage(model: Any) -> Any:
        """How the head is loaded, for its card."""
        from ..hub import Usage

        code = (
            'from hf_xent.models.projection import ProjectionHead\n\nmodel = ProjectionHead.from_pretrained("PLACE")\n'
            '# with the frozen encoder: hf_xent.models.zero_shot.ZeroShot.from_pretrained("PLACE", encoder)'
        )
        note = "The head and the centers of its classes; the encoder is not in here."
        return Usage(code, "hf_xent", note, "feature-extraction")
