"""What the models of the zoo read: text, images, sounds, codes of sounds, by the names of their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from support.models import V


def text_inputs(rows: int = 2, length: int = 12) -> dict[str, Tensor]:
    """Token ids [B, T] that are no special tokens, and labels with ignored positions at both ends."""
    torch.manual_seed(1)
    ids = torch.randint(V // 2, V, (rows, length))
    labels = ids.clone()
    labels[0, :4], labels[-1, -3:] = -100, -100
    return {"input_ids": ids, "labels": labels}


# An image's pixels and what goes beside them, by the name of the model's argument, of pixels and text_inputs.
PICTURED: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {
    "pixel_values": lambda pixels, text: pixels,
    "high_res_pixel_values": lambda pixels, text: pixels,
    "flattened_patches": lambda pixels, text: torch.cat([torch.ones(*pixels.shape[:-1], 2), pixels], -1),
    "image_grid_thw": lambda pixels, text: torch.tensor([[1, 4, 4]]),
    "image_position_ids": lambda pixels, text: torch.cartesian_prod(torch.arange(4), torch.arange(4))[None],
    "image_merge_sizes": lambda pixels, text: torch.tensor([2]),
    "image_sizes": lambda pixels, text: torch.tensor([pixels.shape[-2:]]),
    "image_token_pooling": lambda pixels, text: torch.arange(16).reshape(4, 4),
    "image_grids": lambda pixels, text: torch.tensor([[2, 2, 0, 0]]),
    "image_embeds_position_mask": lambda pixels, text: torch.arange(text["labels"].numel())[None] < 4,
    "target_sizes": lambda pixels, text: torch.tensor([[4, 4]]),
    "spatial_shapes": lambda pixels, text: torch.tensor([[4, 4]]),
    "pixel_attention_mask": lambda pixels, text: torch.ones(pixels.shape[:2], dtype=torch.bool),
    "aspect_ratio_ids": lambda pixels, text: torch.ones(1, 1, dtype=torch.long),
    "aspect_ratio_mask": lambda pixels, text: torch.ones(pixels.shape[:3], dtype=torch.long),
    "cross_attention_mask": lambda pixels, text: torch.ones(*text["labels"].shape, *pixels.shape[1:3]),
    "qformer_input_ids": lambda pixels, text: text["input_ids"],
    "bbox": lambda pixels, text: torch.zeros(*text["labels"].shape, 4),
}
_NEEDED = ("pixel_values", "image_grid_thw", "image_position_ids")  # though their arguments are optional
_IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_patch_id", "video_token_id", "video_token_index")


def inputs_of(mapping: str, model: nn.Module) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What a model may take, best first, each with a note; they are tried until one is accepted."""
    reads_text = mapping in ("Causal LM", "Seq2seq", "Masked LM")
    if reads_text:
        yield "", _accepted(model, text_inputs())
    yield from _pictured(model)
    yield from _heard(model)
    yield from _coded(model)
    text = _accepted(model, text_inputs(rows=1))
    if not reads_text and "input_ids" in text:
        yield "text alone", {**text, **_types(model, text["input_ids"] < 0)}


def _accepted(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs for which the model has arguments."""
    asked = inspect.signature(model.forward).parameters
    return {name: x for name, x in inputs.items() if name in asked}


def _pictured(model: nn.Module) -> Iterator[tuple[str, dict[str, Tensor]]]:
    text = text_inputs(rows=1)
    asked = inspect.signature(model.forward).parameters
    if not asked.keys() & PICTURED.keys():
        return
    for pixels in _pixels(model.config):
        try:
            yield "with an image", _after_image_tokens(model, text, pixels)
        except Exception:  # it makes no tokens of images, or wants its images another way
            pictured = {name: make(pixels, text) for name, make in PICTURED.items() if name in asked}
            yield "with an image", {**_accepted(model, text), **pictured}


def _heard(model: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Random sounds of two recordings: samples, or frames of frequencies, in either order, or eight for each token."""
    text = text_inputs()
    frames = 2 * getattr(model.config, "max_source_positions", 32)
    sounds = {
        "input_values": [(2, 4000)],
        "input_features": [(2, 32, 32), (2, 32, frames), (2, frames, 32), (2, 32, 96)],
    }
    for name, shapes in sounds.items():
        for shape in shapes:
            inputs = _accepted(model, {name: torch.randn(shape), "labels": text["labels"]})
            if name in inputs:
                yield "with a sound", inputs
                yield "with a sound", {**inputs, **_accepted(model, {"input_ids": text["input_ids"]})}


def _coded(model: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Token ids and labels of several codebooks a position, and perhaps of a text beside them."""
    text, count = text_inputs(), getattr(model.config, "num_codebooks", None)
    for streams in (count, count + 1) if count else ():
        repeated = {name: x[..., None].repeat(1, 1, streams) for name, x in text.items()}
        yield "with codes of sounds", repeated
        yield "with codes of sounds", {**repeated, "labels": text["labels"]}


def _pixels(config: Any) -> Iterator[Tensor]:
    """A random image in every form there is: flattened patches, squares, patches, patches of a batch, tiles."""
    vision = getattr(config, "vision_config", None) or getattr(config, "encoder", config)

    def first(*names: str, default: int) -> int:
        found = next((x for x in (getattr(vision, name, None) for name in names) if x), default)
        return found[0] if isinstance(found, (tuple, list)) else found

    channels, side = first("in_channels", "num_channels", default=3), first("image_size", default=32)
    patch = first("model_patch_size", "patch_size", default=8)
    frames = first("temporal_patch_size", "patch_temporal", default=1)
    yield torch.randn(16, channels * frames * patch**2)
    yield torch.randn(1, channels, side, side)
    yield torch.randn(16, channels, patch, patch)
    yield torch.randn(1, 1, channels, side, side)
    yield torch.randn(1, 2, channels, side, side)
    yield torch.randn(1, 16, channels * patch**2)
    yield torch.randn(1, 1, first("max_num_tiles", default=1), channels, side, side)


def _reader(model: Any) -> Any:
    """The method that makes a model's image tokens, or None."""
    parts = [(part, f"get_{kind}_features") for part in (model.base_model, model) for kind in ("image", "video")]
    return next((getattr(part, name) for part, name in parts if hasattr(part, name)), None)


def _after_image_tokens(model: Any, text: dict[str, Tensor], pixels: Tensor) -> dict[str, Tensor]:
    """Text after as many image tokens as the model makes of these pixels. Raises: whatever it raises at them."""
    read = _reader(model)
    wanted = inspect.signature(read).parameters
    pictured = {
        name: make(pixels, text)
        for name, make in PICTURED.items()
        if name in wanted and (name in _NEEDED or wanted[name].default is inspect.Parameter.empty)
    }
    answer = read(**pictured)
    parts = (getattr(answer, name, None) for name in ("pooler_output", "last_hidden_state"))
    features = next((part for part in parts if part is not None), answer)
    features = torch.cat(list(features)) if isinstance(features, (list, tuple)) else features
    found = (getattr(model.config, name, None) for name in _IMAGE_TOKENS)
    token = next(token for token in found if token is not None)
    added = torch.full((1, features.numel() // features.shape[-1]), token)
    ids = torch.cat([added, text["input_ids"]], 1)
    labels = torch.cat([torch.full_like(added, -100), text["labels"]], 1)
    return {"input_ids": ids, "labels": labels, **pictured, **_types(model, ids == token)}


def _types(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Which tokens stand for an image, if the model wants to be told."""
    asked = inspect.signature(model.forward).parameters
    return {name: images.int() for name in ("mm_token_type_ids", "token_type_ids") if name in asked}
