"""How well masks agree: their overlap, and their boundaries up to a tolerance in pixels; one number an image.

    IoU           |P & Y| / |P | Y|
    boundary F    2 p r / (p + r), with p the share of the boundary of P that has a pixel of the boundary of Y within a
                  distance, and r the share of the boundary of Y that has one of P

The overlap is dominated by the inside of large masks; boundary F asks where they end. A boundary is made of the pixels
of a mask that have one of their four neighbours outside of it; the border of the image, and ignored pixels (-100), are
no outside. Distances are Euclidean, so a tolerance of 1 allows the four neighbours, and one of 1.5 the diagonal ones.
Where neither image has the class, both measures are 1; where one has it, they are 0. Where no boundary is seen in
either, boundary F is the overlap.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import distance_transform_edt

from ..options.ranges import is_number

IGNORED = -100


def iou(labels: ArrayLike, predictions: ArrayLike, label: int = 1) -> np.ndarray:
    """Intersection over union of one class.

    Args:
        labels: The ids of pixels [..., H, W], or -100.
        predictions: The predicted ids [..., H, W].
        label: The class; the others are its background.

    Returns:
        The overlap of each image [...], from 0 to 1.

    Raises:
        ValueError: The shapes differ, or are no images.
    """
    _, truth, found = _masks(labels, predictions, label)
    either = (truth | found).sum((-2, -1))
    return np.where(either > 0, (truth & found).sum((-2, -1)) / np.maximum(either, 1), 1.0)


def boundary_f(labels: ArrayLike, predictions: ArrayLike, tolerance: float = 1, label: int = 1) -> np.ndarray:
    """The F score of the boundary of one class.

    Args:
        labels: The ids of pixels [..., H, W], or -100.
        predictions: The predicted ids [..., H, W].
        tolerance: The largest distance in pixels of a boundary from the other that is no error.
        label: The class; the others are its background.

    Returns:
        The score of each image [...], from 0 to 1.

    Raises:
        ValueError: The shapes differ or are no images, or the tolerance is negative.
    """
    if not is_number(tolerance, "[0, inf)"):
        raise ValueError(f"tolerance is {tolerance!r}: choose a distance in pixels, 0 or more")
    known, truth, found = _masks(labels, predictions, label)
    lines = [mask & _near(known & ~mask, 1) for mask in (truth, found)]
    (truth_size, found_size), wide = (line.sum((-2, -1)) for line in lines), [_near(line, tolerance) for line in lines]
    precision = (lines[1] & wide[0]).sum((-2, -1)) / np.maximum(found_size, 1)
    recall = (lines[0] & wide[1]).sum((-2, -1)) / np.maximum(truth_size, 1)
    score = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    return np.where(truth_size + found_size > 0, score, iou(labels, predictions, label))


def _masks(labels: ArrayLike, predictions: ArrayLike, label: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels with a label, and those of the class in labels and in predictions, all [..., H, W]."""
    truth, found = np.asarray(labels), np.asarray(predictions)
    if truth.shape != found.shape or truth.ndim < 2:
        raise ValueError(f"predictions has the shape {found.shape} and labels {truth.shape}: give both as [..., H, W]")
    known = truth != IGNORED
    return known, truth == label, known & (found == label)


def _near(mask: np.ndarray, distance: float) -> np.ndarray:
    """The pixels with one of the mask within a distance."""
    images = mask.reshape(-1, *mask.shape[-2:])  # an image without any has none near; the transform would invent one
    near = [distance_transform_edt(~image) <= distance if image.any() else image for image in images]
    return np.reshape(near, mask.shape)
