"""What landmarks.py measures: of rings [n, 40, 2] in pixels, or of masks [n, 64, 64], against true outlines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from landmark_digits import SIZE

from hf_xent.localization import draw_landmarks
from hf_xent.metrics.contours import contour, crossings, dice, fill, hausdorff, lines, pieces_and_holes, resampled

NAMES = ("Dice", "Hausdorff", "one piece", "crossing")


def measured(found: np.ndarray, outlines: np.ndarray) -> dict[str, float]:
    """Means over images; the outlines [n, 400, 2] are the true ones."""
    flat = found.shape[-1] == 2
    masks = np.stack([fill(x, (SIZE, SIZE)) if flat else x for x in found])
    truth = np.stack([fill(y, (SIZE, SIZE)) for y in outlines])
    points = [resampled(x, 100) if flat else np.concatenate([np.empty((0, 2)), *lines(x)]) for x in found]
    apart = [min(hausdorff(y, x), SIZE * 2**0.5) for x, y in zip(points, outlines, strict=True)]
    right = [pieces_and_holes(mask) == (1, 0) for mask in masks]
    crossed = np.mean([crossings(ring) > 0 for ring in found]) if flat else 0
    values = (dice(truth, masks).mean(), np.mean(apart), np.mean(right), crossed)
    return dict(zip(NAMES, map(float, values), strict=True))


def repaired(masks: np.ndarray) -> np.ndarray:
    """The largest piece of each mask, without holes."""
    return np.stack([fill(contour(mask, 200), mask.shape) if mask.any() else mask for mask in masks])


def picture(folder: Path, rows: Any, arms: tuple[str, ...], side: int, count: int = 6) -> Path:
    """The first of `rows`, which are labelled with true outlines, and what arms found in them under seed 0."""
    first = [rows[i] for i in range(min(count, len(rows)))]
    found = {}
    for arm in arms:
        shapes = np.load(folder / f"{arm}-0.npz")[str(side)][: len(first)]
        found[arm] = [[x / SIZE] if x.shape[-1] == 2 else [line / SIZE for line in lines(x)] for x in shapes]
    images, known = [row["pixel_values"] for row in first], [[row["labels"].numpy()] for row in first]
    return draw_landmarks(images, found, folder / "landmarks.png", known=known)
