"""Changed copies of a batch, which mean the same to a reader: views of images, texts and sounds, from a generator.

    views = ImageViews(flip=True)
    other = views({"pixel_values": images}, torch.Generator().manual_seed(0))

Every row has its own draws. They are made on the CPU, from the given generator alone, so that a seed repeats them on
every device and torch's global generator is left where it was. All sizes are choices of this library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ..options.ranges import check_fields
from ..robust.inputs import PIXELS, SAMPLES, TOKENS, bounds

RADIUS = 2
"""The pixels on each side that a blur looks at."""


@dataclass(frozen=True)
class ImageViews:
    """Images of another contrast and brightness, moved, blurred and with noise; cut to the range of inputs.

    Raises:
        ValueError: An option is out of its range.
    """

    low: Any = None
    """The least value of a channel, a number or a tensor [C, 1, 1]; None for the least one in the batch."""
    high: Any = None
    """The largest value, likewise."""
    contrast: float = 0.2
    """The contrast, which is kept around the mean of an image, is multiplied by 1 - contrast to 1 + contrast."""
    brightness: float = 0.1
    """What is added to each channel, at most, as a share of the range."""
    shift: float = 0.07
    """How far an image is moved, at most, as a share of its sides; edges are repeated."""
    blur: float = 0.7
    """The largest standard deviation of a Gaussian blur, in pixels."""
    noise: float = 0.02
    """The standard deviation of the noise of pixels, as a share of the range."""
    flip: bool = False
    """Whether half of the images are mirrored; digits and letters must not be."""
    ranges: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("contrast", "brightness", "shift"), "[0, 1]"),
        **dict.fromkeys(("blur", "noise"), "[0, inf)"),
    }

    def __post_init__(self) -> None:
        check_fields(self, self.ranges)

    @classmethod
    def of(cls, processor: Any, **options: Any) -> ImageViews:
        """Views in the range of an image processor. Raises: ValueError if it has no mean and standard deviation."""
        low, high = (torch.tensor(end).view(-1, 1, 1) for end in bounds(processor))
        return cls(low, high, **options)

    def __call__(self, inputs: Mapping[str, Any], generator: Generator) -> dict[str, Any]:
        """The inputs with other `pixel_values` [B, C, H, W]. Raises: ValueError for pixels of another shape."""
        x = inputs[PIXELS]
        if x.ndim != 4:
            raise ValueError(f"pixel_values have the shape {tuple(x.shape)}: give images [B, C, H, W], or own views")
        low, high = (_end(end, x, least) for end, least in ((self.low, True), (self.high, False)))
        draws = torch.rand(len(x), 5 + x.shape[1], generator=generator).to(x)
        noise = torch.randn(x.shape, generator=generator).to(x)
        signed = (2 * draws - 1)[..., None, None, None]  # [B, 5 + C, 1, 1, 1]
        mean = x.mean((1, 2, 3), keepdim=True)
        made = mean + (x - mean) * (1 + self.contrast * signed[:, 0])
        made = made + self.brightness * (high - low) * signed[:, 5:].flatten(2, 3)
        made = blurred(self._moved(made, signed[:, 1:4].flatten(1)), self.blur * draws[:, 4])
        made = made + self.noise * (high - low) * noise
        return {**inputs, PIXELS: made.maximum(low).minimum(high)}

    def _moved(self, x: Tensor, signed: Tensor) -> Tensor:
        """Images moved by the first two of three draws from -1 to 1, and mirrored by the sign of the third."""
        places = torch.zeros(len(x), 2, 3, dtype=x.dtype, device=x.device)
        places[:, 0, 0] = signed[:, 2].sign() if self.flip else 1
        places[:, 1, 1] = 1
        places[:, :, 2] = 2 * self.shift * signed[:, :2]  # an image is from -1 to 1 there
        grid = F.affine_grid(places, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def blurred(x: Tensor, sigmas: Tensor) -> Tensor:
    """Images [B, C, H, W] under a Gaussian blur of the standard deviations [B] in pixels; 0 leaves an image alone."""
    steps = torch.arange(-RADIUS, RADIUS + 1, device=x.device, dtype=x.dtype)
    kernels = torch.exp(-((steps / sigmas[:, None].clamp(min=1e-3)) ** 2) / 2)
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(x.shape[1], 0)[:, None]  # [B C, 1, K]
    flat = F.pad(x, [RADIUS] * 4, mode="replicate").flatten(0, 1)[None]
    flat = F.conv2d(flat, kernels[:, :, None], groups=len(kernels))
    return F.conv2d(flat, kernels[..., None], groups=len(kernels))[0].unflatten(0, x.shape[:2])


@dataclass(frozen=True)
class TextViews:
    """Texts in which some tokens are replaced by one that says nothing: word dropout. `of` knows a tokenizer's.

    Raises:
        ValueError: The share is out of its range.
    """

    replacement: int
    """The id that stands for a token that is dropped: that of the mask, or of an unknown token."""
    kept: tuple[int, ...] = ()
    """Ids that are never dropped, such as those of separators and padding."""
    share: float = 0.1
    """The probability that a token is dropped."""
    ranges: ClassVar[dict[str, str]] = {"share": "[0, 1]"}

    def __post_init__(self) -> None:
        check_fields(self, self.ranges)

    @classmethod
    def of(cls, tokenizer: Any, **options: Any) -> TextViews:
        """Views for a tokenizer, which keep its special tokens. Raises: ValueError if it has no id to put in."""
        known = (tokenizer.mask_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
        replacement = next((token for token in known if token is not None), None)
        if replacement is None:
            raise ValueError("tokenizer has no mask, unknown or padding token: name a replacement in TextViews")
        return cls(replacement, tuple(tokenizer.all_special_ids), **options)

    def __call__(self, inputs: Mapping[str, Any], generator: Generator) -> dict[str, Any]:
        """The inputs with other `input_ids` [B, T]."""
        ids = inputs[TOKENS]
        dropped = (torch.rand(ids.shape, generator=generator) < self.share).to(ids.device)
        kept = torch.isin(ids, torch.tensor(self.kept, dtype=ids.dtype, device=ids.device))
        return {**inputs, TOKENS: ids.masked_fill(dropped & ~kept, self.replacement)}


@dataclass(frozen=True)
class SoundViews:
    """Waveforms or spectrograms, louder or softer and with noise.

    Raises:
        ValueError: An option is out of its range.
    """

    gain: float = 0.2
    """A row is multiplied by 1 - gain to 1 + gain."""
    noise: float = 0.05
    """The standard deviation of the noise, as a share of that of the row."""
    ranges: ClassVar[dict[str, str]] = {"gain": "[0, 1]", "noise": "[0, inf)"}

    def __post_init__(self) -> None:
        check_fields(self, self.ranges)

    def __call__(self, inputs: Mapping[str, Any], generator: Generator) -> dict[str, Any]:
        """The inputs with other `input_values` or `input_features` [B, ...]."""
        name = next(name for name in SAMPLES if name in inputs)
        x = inputs[name]
        shape = (-1, *[1] * (x.ndim - 1))
        gains = (1 + self.gain * (2 * torch.rand(len(x), generator=generator) - 1)).to(x).view(shape)
        spread = x.flatten(1).std(1, unbiased=False).view(shape)
        noise = torch.randn(x.shape, generator=generator).to(x)
        return {**inputs, name: gains * x + self.noise * spread * noise}


def default_views(inputs: Mapping[str, Any], generator: Generator) -> dict[str, Any]:
    """Views of images or sounds with the default sizes.

    Raises:
        ValueError: The inputs are texts, whose views need a tokenizer, or none of these.
    """
    if PIXELS in inputs:
        return ImageViews()(inputs, generator)
    if any(name in inputs for name in SAMPLES):
        return SoundViews()(inputs, generator)
    raise ValueError(
        f"augment is None, and the batch has {', '.join(inputs) or 'no inputs'}: give augment=TextViews.of(tokenizer)"
        " for texts, or a function of the inputs and a generator"
    )


def _end(given: Any, x: Tensor, least: bool) -> Tensor:
    """An end of the range as a tensor that broadcasts to images; that of each channel in the batch if it is None."""
    if given is None:
        return (x.amin if least else x.amax)((0, 2, 3), keepdim=True)
    return torch.as_tensor(given).to(x)
