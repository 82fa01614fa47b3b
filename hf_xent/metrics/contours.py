"""Outlines and masks: from a mask to a ring of points, back by filling, and measures of both.

    fill           a pixel is inside if a ray from its centre crosses the rings an odd number of times
    Dice           2 |P & Y| / (|P| + |Y|)
    Hausdorff      max(max_a min_b |a - b|, max_b min_a |a - b|)
    pieces         the components of a mask, pixels that touch by a corner being one
    holes          the components of what is around it, by edges, that do not reach the border of the image
    crossings      the pairs of edges of a ring that cross each other

A point is (x, y) in pixels: the pixel in row i and column j is the square from (j, i) to (j + 1, i + 1), its centre is
(j + 1/2, i + 1/2). Divided by the width and height of an image, points are landmarks of `hf_xent.models.landmarks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import label
from scipy.spatial.distance import directed_hausdorff

from ..options.ranges import check_count

TOUCHING = np.ones((3, 3), int)  # also by a corner
SMALLEST = 3


def fill(rings: ArrayLike | Sequence[ArrayLike], size: tuple[int, int]) -> np.ndarray:
    """The mask of one ring or several; a ring within another one is a hole, by the even-odd rule.

    Args:
        rings: The points of a ring [n, 2], or those of several.
        size: Height and width of the mask in pixels.

    Returns:
        The mask [H, W] of booleans: a pixel whose centre is on an edge may be in or out.

    Raises:
        ValueError: Rings of another shape, of fewer than 3 points, or with a coordinate that is not finite.
    """
    height, width = size
    toggles = np.zeros((height, width + 1), int)
    rows = np.arange(height) + 0.5
    for ring in map(_ring, _several(rings)):
        (x1, y1), (x2, y2) = ring.T, np.roll(ring, -1, 0).T
        i, edge = np.nonzero((y1 <= rows[:, None]) != (y2 <= rows[:, None]))  # the line through the centres of row i
        x = x1[edge] + (rows[i] - y1[edge]) / (y2 - y1)[edge] * (x2 - x1)[edge]
        np.add.at(toggles, (i, np.clip(np.ceil(x - 0.5), 0, width).astype(int)), 1)  # the first centre beyond it
    return toggles[:, :-1].cumsum(1) % 2 == 1


def area(ring: ArrayLike) -> float:
    """The area of a ring [n, 2] by the shoelace formula 1/2 sum_i (x_i y_(i+1) - x_(i+1) y_i), in square pixels.

    It is positive if the ring runs clockwise, as it is seen in an image, where y points down.
    """
    points = _ring(ring)
    (x, y), (after_x, after_y) = points.T, np.roll(points, -1, 0).T
    return float((x * after_y - after_x * y).sum() / 2)


def crossings(ring: ArrayLike) -> int:
    """How many pairs of edges of a ring [n, 2] cross each other; those that only touch do not."""
    points = _ring(ring)
    after, n = np.roll(points, -1, 0), len(points)

    def side(of: np.ndarray) -> np.ndarray:
        """On which side of each edge points are: [edges, points]."""
        (dx, dy), gap = (after - points).T[:, :, None], of[None] - points[:, None]
        return np.sign(dx * gap[..., 1] - dy * gap[..., 0])

    apart = side(points) * side(after) < 0  # [i, j]: the ends of edge j are on both sides of the line of edge i
    pairs = np.triu(apart & apart.T, 2)
    pairs[0, n - 1] = False  # they are neighbours
    return int(pairs.sum())


def lines(mask: ArrayLike, level: float = 0.5) -> list[np.ndarray]:
    """All closed outlines of a mask, around its pieces and its holes, by marching squares.

    Args:
        mask: The mask [H, W]: booleans, or numbers of which those above the level are inside.
        level: Where the outline is, by linear interpolation between centres of pixels.

    Returns:
        The points of each outline [n, 2], the first not repeated; no outline if nothing is inside. At the border of the
        image, an outline runs along the border or inside of it.

    Raises:
        ValueError: A mask that is no image, is empty, or has a number that is not finite.
    """
    from contourpy import contour_generator  # comes with matplotlib

    values = np.asarray(mask, float)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"mask has the shape {values.shape}: give one image [H, W] of numbers that are finite")
    outside = min(values.min(), 2 * level - values.max())  # as far below the level as the highest number is above it
    found = contour_generator(z=np.pad(values, 1, constant_values=outside)).lines(level)
    return [np.asarray(line)[:-1] - 0.5 for line in found if len(line) > SMALLEST]


def contour(mask: ArrayLike, points: int = 40, level: float = 0.5) -> np.ndarray:
    """The outline of the largest piece of a mask as a ring of points at equal distances along it.

    It starts at its highest point (of several, at the one that is nearest to the middle of the outline) and runs
    clockwise, as it is seen in the image. Holes are not seen.

    Args:
        mask: The mask [H, W], as of `lines`.
        points: The number of points, from 3.
        level: As of `lines`.

    Returns:
        The points [points, 2], x and y in pixels.

    Raises:
        ValueError: A mask that is no image or has nothing inside, or fewer than 3 points.
    """
    check_count("points", points, SMALLEST)
    found = lines(mask, level)
    if not found:
        raise ValueError(f"mask has nothing above the level {level}: it has no outline")
    ring = max(found, key=lambda line: abs(area(line)))
    ring = ring if area(ring) > 0 else ring[::-1]
    middle = (ring[:, 0].min() + ring[:, 0].max()) / 2
    first = np.lexsort((abs(ring[:, 0] - middle), ring[:, 1].round(9)))[0]
    return resampled(np.roll(ring, -first, 0), points)


def resampled(ring: ArrayLike, points: int) -> np.ndarray:
    """A ring [n, 2] as another number of points at equal distances along it, of which the first stays [points, 2]."""
    check_count("points", points, SMALLEST)
    closed = np.concatenate([_ring(ring), _ring(ring)[:1]])
    along = np.concatenate([[0], np.hypot(*np.diff(closed, axis=0).T).cumsum()])
    places = np.arange(points) * (along[-1] / points)
    return np.stack([np.interp(places, along, values) for values in closed.T], 1)


def dice(labels: ArrayLike, predictions: ArrayLike) -> np.ndarray:
    """2 |P & Y| / (|P| + |Y|) of masks of booleans [..., H, W]; 1 where both are empty.

    Args:
        labels: The masks Y.
        predictions: The masks P.

    Returns:
        The Dice coefficient of each image [...], from 0 to 1.

    Raises:
        ValueError: The shapes differ, or are no images.
    """
    truth, found = np.asarray(labels, bool), np.asarray(predictions, bool)
    if truth.shape != found.shape or truth.ndim < 2:
        raise ValueError(f"predictions has the shape {found.shape} and labels {truth.shape}: give both as [..., H, W]")
    both, sizes = (truth & found).sum((-2, -1)), truth.sum((-2, -1)) + found.sum((-2, -1))
    return np.where(sizes > 0, 2 * both / np.maximum(sizes, 1), 1.0)


def hausdorff(labels: ArrayLike, predictions: ArrayLike) -> float:
    """The Hausdorff distance of points [n, 2] and [m, 2]: the largest distance of a point from the other set.

    It is inf if one set is empty, and 0 if both are.
    """
    truth, found = (np.asarray(points, float).reshape(-1, 2) for points in (labels, predictions))
    if not (len(truth) and len(found)):
        return 0.0 if len(truth) == len(found) else float("inf")
    return max(directed_hausdorff(truth, found)[0], directed_hausdorff(found, truth)[0])


def pieces_and_holes(mask: ArrayLike) -> tuple[int, int]:
    """How many pieces and how many holes a mask of booleans [H, W] has; see the module's docstring.

    Raises:
        ValueError: A mask that is no image.
    """
    inside = np.asarray(mask, bool)
    if inside.ndim != 2:
        raise ValueError(f"mask has the shape {inside.shape}: give one image, [H, W]")
    return label(inside, TOUCHING)[1], label(np.pad(~inside, 1, constant_values=True))[1] - 1


def _several(rings: Any) -> Sequence[ArrayLike]:
    """A list of rings, from one or several."""
    return [rings] if len(rings) and np.ndim(rings[0]) == 1 else rings


def _ring(points: ArrayLike) -> np.ndarray:
    """The points of a ring, checked."""
    ring = np.asarray(points, float)
    if ring.ndim != 2 or ring.shape[1] != 2 or len(ring) < SMALLEST:
        raise ValueError(f"ring has the shape {ring.shape}: give 3 points or more, [n, 2]")
    if not np.isfinite(ring).all():
        raise ValueError("ring has a coordinate that is not finite: give numbers of pixels")
    return ring
