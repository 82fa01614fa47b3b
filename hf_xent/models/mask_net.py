"""A small convolutional network of masks over spectrograms of any size, for trainers of transformers.

    x [B, 1, F, T]   log-magnitudes, normalised; beside them the height of a bin, from -1 to 1, as a second channel
    down             3 x 3 convolutions; all but the first halve the frequencies, none the frames
    middle           3 x 3 convolutions that skip frames, each added to what it read
    up               frequencies doubled and convolved, added to those of the same size on the way down
    logits           [B, num_labels, F, T]; with one label its sigmoid, with two the softmax of the second, is the share
                     of the voice: sigmoid(z), z = logits_0, or logits_1 - logits_0

    config = MaskNetConfig(num_labels=1)
    model = MaskNet(config)                                    # 51,000 weights

A frame's mask depends on `config.context` frames on both sides, no others: long sounds can be read in parts. The loss
is binary cross-entropy of z; `labels` that are ids or booleans are softened to .98 and .02, floats are as they are.
`targets` instead of labels train the same weights to rebuild log-magnitudes by z, by mean squared error: the authors'
pre-training, whose sigmoid cross-entropy has magnitudes above 1 as its targets, which no sigmoid reaches.

Importing this file registers both classes, so that `AutoModelForSemanticSegmentation` loads what was saved. The file is
saved with the model, which with `trust_remote_code=True` also loads where hf_xent is not installed.

Source: Lin et al. 2018, arXiv:1812.01278, for masks as labels, their softening and the pre-training; their network has
19.5 million weights, two dense layers among them, and sees nine frames. Ronneberger, Fischer, Brox 2015,
arXiv:1505.04597, for the way down and up.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSemanticSegmentation, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput


class MaskNetConfig(PreTrainedConfig):
    """Configuration of `MaskNet`.

    Args:
        channels: The widths on the way down; all but the first halve the frequencies.
        dilations: For each convolution in the middle, how many frames lie between those that it sees.
        smoothing: What is taken from labels of 1 and added to those of 0, in [0, 1/2).
        window_length: The window of the transform that spectrograms are of, in samples.
        hop_length: Its hop.
        sampling_rate: Samples per second.
        **kwargs: As for `transformers.PreTrainedConfig`; num_labels is 1 or 2.

    Raises:
        ValueError: No channels, numbers below 1, or a smoothing out of range.
    """

    model_type = "hf_xent_mask_net"

    def __init__(
        self, channels: tuple[int, ...] = (8, 16, 24, 32), dilations: tuple[int, ...] = (1, 2, 4),
        smoothing: float = 0.02, window_length: int = 256, hop_length: int = 64, sampling_rate: int = 8000,
        **kwargs: Any,
    ):  # fmt: skip
        if not channels or min(channels) < 1:
            raise ValueError(f"channels is {channels}: give one or more widths of at least 1")
        if dilations and min(dilations) < 1:
            raise ValueError(f"dilations is {dilations}: give whole numbers of at least 1")
        if not 0 <= smoothing < 0.5:
            raise ValueError(f"smoothing is {smoothing}: choose 0 <= smoothing < 0.5")
        self.channels, self.dilations, self.smoothing = list(channels), list(dilations), smoothing
        self.window_length, self.hop_length, self.sampling_rate = window_length, hop_length, sampling_rate
        self.num_channels = 1
        super().__init__(**kwargs)

    @property
    def context(self) -> int:
        """How many frames on each side of a frame its mask depends on."""
        return 2 * len(self.channels) - 1 + sum(self.dilations)


class MaskNet(PreTrainedModel):
    """Masks of spectrograms, as logits of one label or two."""

    config_class = MaskNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: MaskNetConfig):
        super().__init__(config)
        if config.num_labels not in (1, 2):
            raise ValueError(f"num_labels is {config.num_labels}: a mask has 1 label, or 2, the second for the voice")
        widths = [2, *config.channels]
        steps = [1] + [2] * (len(config.channels) - 1)
        self.normalization = nn.BatchNorm2d(1)
        self.down = nn.ModuleList(
            _layer(a, b, stride=(s, 1)) for (a, b), s in zip(pairwise(widths), steps, strict=True)
        )
        self.middle = nn.ModuleList(_layer(widths[-1], widths[-1], frames=d) for d in config.dilations)
        self.up = nn.ModuleList(_layer(b, a) for a, b in list(pairwise(config.channels))[::-1])
        self.classifier = nn.Conv2d(config.channels[0], config.num_labels, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """All layers start as torch's do."""
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.reset_parameters()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, targets: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> SemanticSegmenterOutput:  # fmt: skip
        """Logits of masks, and their loss if labels or targets are given.

        Args:
            pixel_values: Log-magnitudes of spectrograms [B, 1, F, T].
            labels: The mask [B, F, T]: ids 0 and 1, -100 or 255 where none is known (255 unless the
                configuration has another `semantic_loss_ignore_index`), or booleans; or shares from 0 to 1, as floats.
            targets: Log-magnitudes [B, F, T] to rebuild, instead of labels.
            output_hidden_states: Whether to return what each layer makes.

        Returns:
            `logits` [B, num_labels, F, T], `loss`, the mean over bins with a label, and `hidden_states`.

        Raises:
            ValueError: Inputs of another shape, or labels and targets at once.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 1:
            raise ValueError(f"pixel_values has shape {tuple(pixel_values.shape)}: give spectrograms [B, 1, F, T]")
        if labels is not None and targets is not None:
            raise ValueError("labels and targets are both given: a batch has a mask to find, or magnitudes to rebuild")
        height = torch.linspace(-1, 1, pixel_values.shape[2], dtype=pixel_values.dtype, device=pixel_values.device)
        x = torch.cat([self.normalization(pixel_values), height[:, None].expand_as(pixel_values)], 1)
        x, states = x.contiguous(memory_format=torch.channels_last), []  # twice as fast on CPUs
        for layer in self.down:
            states.append(x := layer(x))
        sizes = states[-2::-1]
        for layer in self.middle:
            states.append(x := x + layer(x))
        for layer, other in zip(self.up, sizes, strict=True):
            states.append(x := layer(F.interpolate(x, size=other.shape[-2:])) + other)
        logits = self.classifier(x).contiguous()
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = tuple(states) if output_hidden_states else None
        loss = self._loss(logits, labels, targets)
        return SemanticSegmenterOutput(loss=loss, logits=logits, hidden_states=hidden_states)

    def _loss(self, logits: Tensor, labels: Tensor | None, targets: Tensor | None) -> Tensor | None:
        z = (logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]).float()
        wanted = labels if targets is None else targets
        if wanted is None:
            return None
        if wanted.shape != z.shape:
            name = "labels" if targets is None else "targets"
            raise ValueError(
                f"{name} has shape {tuple(wanted.shape)}, the spectrograms {tuple(z.shape)}: give one each"
            )
        if targets is not None:
            return F.mse_loss(z, targets.float())
        if wanted.is_floating_point():
            return F.binary_cross_entropy_with_logits(z, wanted.float())
        ignored = getattr(self.config, "semantic_loss_ignore_index", 255)
        known = (wanted != -100) & (wanted != ignored) if wanted.dtype != torch.bool else torch.ones_like(wanted)
        softened = wanted.float() * (1 - 2 * self.config.smoothing) + self.config.smoothing
        each = F.binary_cross_entropy_with_logits(z, softened.where(known, 0.0), reduction="none")
        return (each * known).sum() / known.sum().clamp(min=1)


def _layer(inputs: int, outputs: int, stride: tuple[int, int] = (1, 1), frames: int = 1) -> nn.Sequential:
    """A convolution of 3 frequencies by 3 frames that lie `frames` apart, normalised."""
    layout: dict[str, Any] = {"stride": stride, "padding": (1, frames), "dilation": (1, frames)}
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, bias=False, **layout), nn.BatchNorm2d(outputs), nn.ReLU())


AutoConfig.register(MaskNetConfig.model_type, MaskNetConfig, exist_ok=True)
AutoModelForSemanticSegmentation.register(MaskNetConfig, MaskNet, exist_ok=True)
MaskNetConfig.register_for_auto_class()
MaskNet.register_for_auto_class("AutoModelForSemanticSegmentation")
