"""Feature maps of models of images: a vector for each cell of a grid over the image.

    maps = feature_maps(AutoBackbone.from_pretrained(...), pixel_values)        # [B, D, h, w]
    maps = feature_maps(segformer, pixel_values, layer=0)                       # of its first stage

Backbones have feature maps, and convolutional and hierarchical encoders (ResNet, ConvNeXt, SegFormer) end in one. The
tokens of a vision transformer are a grid of patches, behind the class token, the distillation token or registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..models.contexts import eval_mode


def feature_maps(model: Any, pixel_values: Tensor, layer: int | None = None) -> Tensor:
    """The feature maps of images, in evaluation mode.

    Args:
        model: A backbone or an encoder of images of transformers, a model with one (its `base_model`, or the image
            tower of two), or any function from pixels to maps.
        pixel_values: [B, C, H, W].
        layer: Which of the backbone's feature maps or of the encoder's hidden states; the last one if it is left out.

    Returns:
        [B, D, h, w], in the model's dtype.

    Raises:
        ValueError: Pixels of another shape, a model without maps or tokens, or a number of tokens that is no grid.
    """
    if pixel_values.ndim != 4:
        raise ValueError(f"pixel_values has the shape {tuple(pixel_values.shape)}: give images as [B, C, H, W]")
    encoder = _encoder(model)
    options = {} if layer is None or hasattr(encoder, "out_features") else {"output_hidden_states": True}
    with eval_mode(encoder) if isinstance(encoder, nn.Module) else nullcontext():
        output = encoder(pixel_values, **options)
    if isinstance(output, Tensor):
        found = output
    elif getattr(output, "feature_maps", None) is not None:
        found = output.feature_maps[-1 if layer is None else layer]
    elif getattr(output, "last_hidden_state", None) is not None:
        found = output.last_hidden_state if layer is None else output.hidden_states[layer]
    else:
        raise ValueError(f"model is a {type(model).__name__} without feature maps: pass a backbone or an encoder")
    return found if found.ndim == 4 else _grid(found, pixel_values, encoder)


def on_grid(masks: Tensor, size: Sequence[int]) -> Tensor:
    """The values of masks [..., H, W] at the centres of the cells of a grid [..., h, w]; integers stay integers."""
    flat = masks.reshape(-1, 1, *masks.shape[-2:]).double()
    return F.interpolate(flat, tuple(size), mode="nearest-exact").reshape(*masks.shape[:-2], *size).to(masks.dtype)


def _encoder(model: Any) -> Any:
    """What makes the features of a model: a classifier's base, the image tower of two, or the model itself."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, "vision_model", None) or getattr(inner, "base_model", None) or inner


def _grid(tokens: Tensor, pixel_values: Tensor, encoder: Any) -> Tensor:
    """Tokens [B, T, D] as maps [B, D, h, w], without those in front that belong to no patch."""
    patch = getattr(getattr(encoder, "config", None), "patch_size", None)
    if tokens.ndim != 3 or not isinstance(patch, int | tuple | list):
        raise ValueError(f"model gives {tuple(tokens.shape)}, which is no grid: pass a backbone (AutoBackbone)")
    sides = (patch, patch) if isinstance(patch, int) else patch
    h, w = (length // side for length, side in zip(pixel_values.shape[-2:], sides, strict=True))
    front = tokens.shape[1] - h * w
    if not 0 <= front < h * w:
        raise ValueError(
            f"model gives {tokens.shape[1]} tokens for {h} x {w} patches, which are no grid: pass a backbone"
        )
    return tokens[:, front:].transpose(1, 2).unflatten(2, (h, w))
