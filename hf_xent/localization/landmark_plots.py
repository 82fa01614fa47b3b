"""Rings of landmarks over images: what models found in orange, and in blue what is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..system.figures import panels, save
from .plots import COLOR, overlay

KNOWN = "#009ADE"


def split_rings(landmarks: ArrayLike, rings: Sequence[int]) -> list[np.ndarray]:
    """The rings of one image.

    Args:
        landmarks: x and y of its landmarks [N, 2], ring after ring.
        rings: The number of landmarks of each ring.

    Returns:
        The points of each ring [n, 2].

    Raises:
        ValueError: The rings have another number of landmarks than there are.
    """
    points = np.asarray(landmarks, float)
    if points.shape != (sum(rings), 2):
        raise ValueError(f"landmarks has the shape {points.shape}: give the {sum(rings)} of all rings, [N, 2]")
    return np.split(points, np.cumsum(rings)[:-1])


def draw_landmarks(
    images: Sequence[Any],
    found: Mapping[str, Sequence[Sequence[ArrayLike]]],
    output: Path,
    *,
    known: Sequence[Sequence[ArrayLike]] | None = None,
    titles: Sequence[str] = (),
) -> Path:
    """Write a figure of images in columns, with the rings of each method in a row.

    Args:
        images: The images, each as for `overlay`.
        found: Method -> for each image its rings, as of `split_rings`: x and y [n, 2] from 0 to 1 across the image.
            Outlines of masks (`hf_xent.metrics.contours.lines`, divided by width and height) are drawn as well.
        output: The file.
        known: The true rings of each image.
        titles: What stands above each column.

    Returns:
        The path of the PNG file.

    Raises:
        ValueError: There is nothing to draw, or a method has rings of another number of images.
    """
    if not found or not len(images):
        raise ValueError(f"found has {len(found)} methods, for {len(images)} images: give one or more of both")
    for name, those in {**found, "known": images if known is None else known}.items():
        if len(those) != len(images):
            raise ValueError(
                f"{name} has rings of {len(those)} images, but there are {len(images)}: give those of each"
            )
    figure, (axis,) = panels(1, 1.6 * len(images) + 0.4, 1.6 * len(found) + 0.3)
    axis.remove()
    grid = figure.subplots(len(found), len(images), squeeze=False)
    for row, (name, those) in zip(grid, found.items(), strict=True):
        for column, panel in enumerate(row):
            height, width = np.shape(images[column])[-2:]  # the channel is first, or there is none
            if np.ndim(images[column]) == 3 and width in (1, 3):
                height, width = np.shape(images[column])[:2]
            picture = overlay(images[column], np.zeros((height, width)))
            panel.imshow(picture, interpolation="nearest", extent=(0, width, height, 0))
            if known is not None:
                _draw(panel, known[column], (width, height), color=KNOWN, linewidth=1)
            _draw(panel, those[column], (width, height), color=COLOR, linewidth=1, marker=".", markersize=2.5)
            panel.set_xlim(0, width)
            panel.set_ylim(height, 0)
            panel.set_xticks([])
            panel.set_yticks([])
        row[0].set_ylabel(name, fontsize=9)
    for panel, title in zip(grid[0], titles, strict=False):
        panel.set_title(title, fontsize=9)
    return save(figure, output)


def _draw(panel: Any, rings: Sequence[ArrayLike], size: tuple[int, int], **style: Any) -> None:
    """Closed rings, from 0 to 1 across the image, in its pixels."""
    for ring in rings:
        points = np.asarray(ring, float) * size
        panel.plot(*np.concatenate([points, points[:1]]).T, **style)
