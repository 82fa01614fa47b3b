"""BASNet, a network for masks with sharp edges: an encoder and decoder that predict, and a small U-Net that refines.

    d_1 ... d_6, bridge = predict(image)        a logit for every pixel and class, at seven depths
    logits              = d_1 + refine(d_1)     the residual is added to logits, before any sigmoid

The encoder is a ResNet whose first convolution keeps the image's size. From the fifth stage on, stages begin with a
pooling of 2 x 2 pixels in place of a stride. The bridge below has convolutions with holes (dilation 2), and each stage
of the decoder sees the one below at its size and the encoder's. Every depth has an output of its own, which
`side_logits` returns at the size of the image, so that each can be trained ('deep supervision'): `ClassTrainer` adds up
any loss of `hf_xent.classes` over them, as the authors do with `hybrid`.

    config = BasnetConfig(hidden_sizes=[16, 32, 64], depths=[1, 1, 1], num_channels=1, num_labels=1)
    model = BasnetForSemanticSegmentation(config)          # refine=False: the predicting part alone, a U-Net

Images may have any size: stages round up, and the decoder interpolates to the size of the encoder's stage. Importing
this file registers both classes for `AutoModelForSemanticSegmentation`; the file is saved with the model.

Source: Qin et al. 2019, BASNet: Boundary-Aware Salient Object Detection, CVPR; code at github.com/xuebinqin/BASNet. In
it the deepest stage of the decoder ends with the norm of the stage above, by mistake, and losses read sigmoids; here
each stage has its own norms, and losses read logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSemanticSegmentation, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput

STRIDED = 4
"""The number of stages of a ResNet; those after them begin with a pooling."""


class BasnetConfig(PreTrainedConfig):
    """Configuration of `BasnetForSemanticSegmentation`; the defaults are the authors' network.

    Args:
        hidden_sizes: The width of each stage of the encoder; the size of the image halves from each to the next.
        depths: The number of residual blocks of each stage.
        refine: Whether the refining network follows.
        refine_size: Its width.
        refine_depth: The number of its stages.
        num_channels: The number of channels of images.
        semantic_loss_ignore_index: The label of pixels that do not count, beside those below 0.
        **kwargs: As for `transformers.PreTrainedConfig`, such as num_labels: 1 for a logit of the foreground, else a
            logit for each class.

    Raises:
        ValueError: Widths or depths that are not positive, or lists of two lengths.
    """

    model_type = "hf_xent_basnet"
    keys_to_ignore_at_inference = ["side_logits"]  # noqa: RUF012  as transformers has it

    def __init__(
        self, hidden_sizes: list[int] | None = None, depths: list[int] | None = None, refine: bool = True,
        refine_size: int = 64, refine_depth: int = 4, num_channels: int = 3, semantic_loss_ignore_index: int = 255,
        **kwargs: Any,
    ):  # fmt: skip
        hidden_sizes = [64, 128, 256, 512, 512, 512] if hidden_sizes is None else list(hidden_sizes)
        depths = [3, 4, 6, 3, 3, 3][: len(hidden_sizes)] if depths is None else list(depths)
        if not hidden_sizes or len(hidden_sizes) != len(depths):
            raise ValueError(
                f"hidden_sizes has {len(hidden_sizes)} numbers and depths {len(depths)}: give one for each stage"
            )
        sizes = {"refine_size": [refine_size], "refine_depth": [refine_depth], "num_channels": [num_channels]}
        for name, given in {"hidden_sizes": hidden_sizes, "depths": depths, **sizes}.items():
            if min(given) < 1:
                raise ValueError(f"{name} has the number {min(given)}: give 1 or more")
        self.hidden_sizes, self.depths, self.refine = hidden_sizes, depths, refine
        self.refine_size, self.refine_depth, self.num_channels = refine_size, refine_depth, num_channels
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        super().__init__(**kwargs)


@dataclass
class BasnetSemanticSegmenterOutput(SemanticSegmenterOutput):
    """As transformers' models for masks, with `side_logits`: [B, num_labels, H, W] each, from d_1 down to the bridge.

    Without the refining network `logits` is d_1, and `side_logits` begins with d_2.
    """

    side_logits: tuple[Tensor, ...] | None = None


class BasnetBlock(nn.Module):
    """The basic block of a ResNet: two convolutions, added to what goes in."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, H, W] to [B, width, H / stride, W / stride]."""
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + self.shortcut(x)).relu()


class BasnetPredict(nn.Module):
    """The encoder, the bridge and the decoder, with the logits of every depth at the size of that depth."""

    def __init__(self, config: BasnetConfig):
        super().__init__()
        widths, labels = config.hidden_sizes, config.num_labels
        above = [widths[0], *widths[:-1]]
        self.stem = _convolution(config.num_channels, widths[0])
        self.encoder = nn.ModuleList()
        for k, (before, width, depth) in enumerate(zip(above, widths, config.depths, strict=True)):
            first = BasnetBlock(before, width, 2 if 0 < k < STRIDED else 1)
            blocks = [first, *(BasnetBlock(width, width, 1) for _ in range(depth - 1))]
            self.encoder.append(nn.Sequential(*([_pooling()] if k >= STRIDED else []), *blocks))
        last = widths[-1]
        self.bridge = nn.Sequential(*(_convolution(last, last, 2) for _ in range(3)))
        self.decoder = nn.ModuleList()
        for k, (after, width) in enumerate(zip(above, widths, strict=True)):
            holes = 2 if k == len(widths) - 1 else 1
            pairs = ((2 * width, width, 1), (width, width, holes), (width, after, holes))
            self.decoder.append(nn.Sequential(*(_convolution(*pair) for pair in pairs)))
        self.heads = nn.ModuleList(nn.Conv2d(width, labels, 3, 1, 1) for width in (*above, last))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Logits of images [B, C, H, W], from d_1 down to the bridge: [B, num_labels, h, w] each."""
        x, seen = self.stem(image), []
        for stage in self.encoder:
            x = stage(x)
            seen.append(x)
        x = self.bridge(x)
        logits = [self.heads[-1](x)]
        for k in reversed(range(len(seen))):
            x = self.decoder[k](torch.cat([_at_size(x, seen[k]), seen[k]], 1))
            logits.append(self.heads[k](x))
        return logits[::-1]


class BasnetRefine(nn.Module):
    """A U-Net of one width, whose output is added to what goes in."""

    def __init__(self, config: BasnetConfig):
        super().__init__()
        labels, width, depth = config.num_labels, config.refine_size, config.refine_depth
        self.stem = nn.Conv2d(labels, width, 3, 1, 1)
        self.encoder = nn.ModuleList(_convolution(width, width) for _ in range(depth))
        self.bridge = _convolution(width, width)
        self.pooling = _pooling()
        self.decoder = nn.ModuleList(_convolution(2 * width, width) for _ in range(depth))
        self.head = nn.Conv2d(width, labels, 3, 1, 1)

    def forward(self, logits: Tensor) -> Tensor:
        """Refined logits, [B, num_labels, H, W]."""
        x, seen = self.stem(logits), []
        for stage in self.encoder:
            seen.append(stage(x))
            x = self.pooling(seen[-1])
        x = self.bridge(x)
        for stage, level in zip(self.decoder, reversed(seen), strict=True):
            x = stage(torch.cat([_at_size(x, level), level], 1))
        return logits + self.head(x)


class BasnetForSemanticSegmentation(PreTrainedModel):
    """BASNet; see the file's docstring."""

    config_class = BasnetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: BasnetConfig):
        super().__init__(config)
        self.predict = BasnetPredict(config)
        self.refine = BasnetRefine(config) if config.refine else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Residual blocks start as those of a ResNet, other convolutions as torch's, norms as 1 and 0."""
        if not isinstance(module, nn.Conv2d):
            super()._init_weights(module)
        elif module.bias is None:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:
            module.reset_parameters()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> BasnetSemanticSegmenterOutput:
        """Logits of pixels, and their loss if labels are given.

        Args:
            pixel_values: Images [B, C, H, W].
            labels: Ids of pixels [B, H', W'].

        Returns:
            `logits` [B, num_labels, H, W], `side_logits`, and `loss`: the sum over all of them of the mean over
            labelled pixels of binary cross-entropy, or of cross-entropy with two or more labels; 0 without any.

        Raises:
            ValueError: Images with another number of channels than the configuration has.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}: give images of {self.config.num_channels}"
                " channels, [B, C, H, W]"
            )
        logits, *sides = (_at_size(z, pixel_values) for z in self.predict(pixel_values))
        if self.refine is not None:
            logits, sides = self.refine(logits), [logits, *sides]
        loss = None if labels is None else torch.stack([self._loss(z, labels) for z in (logits, *sides)]).sum()
        return BasnetSemanticSegmenterOutput(loss=loss, logits=logits, side_logits=tuple(sides))

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy of labelled pixels, from logits and in float32 or wider."""
        known = (labels >= 0) & (labels != self.config.semantic_loss_ignore_index)
        logits = _at_size(logits if logits.itemsize >= 4 else logits.float(), labels)
        ids = labels.masked_fill(~known, 0)
        if logits.shape[1] == 1:
            losses = F.binary_cross_entropy_with_logits(logits[:, 0], ids.to(logits.dtype), reduction="none")
        else:
            losses = F.cross_entropy(logits, ids, reduction="none")
        return (losses * known).sum() / known.sum().clamp(min=1)


def _convolution(before: int, width: int, holes: int = 1) -> nn.Sequential:
    """A convolution of 3 x 3 pixels that keeps the size, its norm and ReLU."""
    return nn.Sequential(nn.Conv2d(before, width, 3, 1, holes, holes), nn.BatchNorm2d(width), nn.ReLU())


def _pooling() -> nn.MaxPool2d:
    return nn.MaxPool2d(2, ceil_mode=True)


def _at_size(x: Tensor, like: Tensor) -> Tensor:
    """A map [B, C, h, w] at the height and width of another tensor [..., H, W]."""
    size = like.shape[-2:]
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


AutoConfig.register(BasnetConfig.model_type, BasnetConfig, exist_ok=True)
AutoModelForSemanticSegmentation.register(BasnetConfig, BasnetForSemanticSegmentation, exist_ok=True)
BasnetConfig.register_for_auto_class()
BasnetForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
