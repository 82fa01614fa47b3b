"""Masks over images: what a model marks, in colour on the grey image, with the outline of what is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..system.figures import panels, save

COLOR = (0.90, 0.33, 0.05)  # vermilion: it differs from grey for all kinds of colour vision


def overlay(
    image: ArrayLike, mask: ArrayLike, color: Sequence[float] = COLOR, opacity: float = 0.6
) -> np.ndarray:  # fmt: skip
    """A picture of a mask over an image.

    Args:
        image: Grey [H, W] or [1, H, W], or RGB [3, H, W] or [H, W, 3]; bytes, or numbers of any range, which is
            stretched to black and white.
        mask: The mask [H, W], from 0 to 1, or True and False.
        color: Red, green and blue of the mask, from 0 to 1.
        opacity: How much of the image a mask of 1 hides, from 0 to 1.

    Returns:
        Red, green and blue from 0 to 1 [H, W, 3].

    Raises:
        ValueError: The shapes do not fit.
    """
    picture, weight = np.asarray(image), np.asarray(mask, float)
    if picture.ndim == 3 and picture.shape[0] in (1, 3):
        picture = picture.transpose(1, 2, 0)
    if picture.shape[:2] != weight.shape or weight.ndim != 2 or picture.shape[2:] not in ((), (1,), (3,)):
        raise ValueError(f"image has shape {picture.shape}, mask {weight.shape}: give [H, W] or [3, H, W], and [H, W]")
    low, high = (0, 255) if picture.dtype == np.uint8 else (picture.min(), picture.max())
    picture = (picture.astype(float) - low) / max(high - low, np.finfo(float).tiny)
    picture = np.broadcast_to(picture.reshape(*weight.shape, -1), (*weight.shape, 3))
    share = opacity * weight.clip(0, 1)[..., None]
    return ((1 - share) * picture + share * np.asarray(color)).clip(0, 1)


def overlays(
    images: Sequence[Any],
    masks: Mapping[str, Sequence[Any]],
    output: Path,
    *,
    known: Sequence[Any] | None = None,
    titles: Sequence[str] = (),
) -> Path:
    """Write a figure of images in columns: as they are, and then with the masks of each method in a row.

    Args:
        images: The images, each as for `overlay`.
        masks: Method -> its mask of each image.
        output: The file.
        known: The true mask of each image [H, W], whose outline is drawn.
        titles: What stands above each column, such as the class.

    Returns:
        The path of the PNG file.

    Raises:
        ValueError: There is nothing to draw, or a method has another number of masks than there are images.
    """
    for name, those in masks.items():
        if len(those) != len(images) or not len(images):
            raise ValueError(f"masks has {len(those)} of {name} for {len(images)} images: give one for each")
    names = ["image", *masks]
    figure, (axis,) = panels(1, 1.25 * len(images) + 1.2, 1.3 * len(names) + 0.4)
    axis.remove()
    grid = figure.subplots(len(names), len(images), squeeze=False)
    for row, name in zip(grid, names, strict=True):
        for column, panel in enumerate(row):
            mask = np.zeros(np.shape(next(iter(masks.values()))[column])) if name == "image" else masks[name][column]
            panel.imshow(overlay(images[column], mask), interpolation="nearest")
            if known is not None:
                panel.contour(np.asarray(known[column], float), [0.5], colors="#009ADE", linewidths=0.8)
            panel.set_xticks([])
            panel.set_yticks([])
        row[0].set_ylabel(name)
    for panel, title in zip(grid[0], titles, strict=False):
        panel.set_title(title, fontsize=9)
    return save(figure, output)
