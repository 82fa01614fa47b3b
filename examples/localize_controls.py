"""How well maps of pixels find a mask, and maps that no network made, to compare with."""

from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score as precision
from torch.nn import functional as F

from hf_xent.metrics.masks import iou

THRESHOLDS, CELLS = np.arange(0.02, 0.99, 0.02), 16


def overlaps(maps: Any, truth: Any) -> np.ndarray:
    """IoU of each image at each threshold [thresholds, N]."""
    return np.stack([iou(truth, np.asarray(maps) > h) for h in THRESHOLDS])


def measured(maps: list[Any], truth: list[Any]) -> dict[str, float]:
    """The metrics of test maps at the threshold that was best on validation maps; lists are (validation, test)."""
    threshold = overlaps(maps[0], truth[0]).mean(1).argmax()
    found = overlaps(maps[1], truth[1])
    areas = [
        precision(y.flatten(), p.flatten()) for p, y in zip(np.asarray(maps[1]), np.asarray(truth[1]), strict=True)
    ]
    return {"IoU": found[threshold].mean(), "IoU, best threshold": found.max(0).mean(),
            "average precision": float(np.mean(areas)), "threshold": THRESHOLDS[threshold]}  # fmt: skip


def whole(images: Any, masks: Any, draw: Any, area: float) -> Any:
    """Everything."""
    return torch.ones_like(images)


def centre(images: Any, masks: Any, draw: Any, area: float) -> Any:
    """A square of the mean area of the masks of validation rows, in the middle."""
    found, size = torch.zeros_like(images), images.shape[-1]
    edge = (size - round(size * area**0.5)) // 2
    found[:, edge : size - edge, edge : size - edge] = 1
    return found


def noise(images: Any, masks: Any, draw: Any, area: float) -> Any:
    """Random cells."""
    return in_pixels(torch.rand(len(images), CELLS, CELLS, generator=draw), images)


def grey(images: Any, masks: Any, draw: Any, area: float) -> Any:
    """The grey value."""
    return (images + 1) / 2


def cells(images: Any, masks: Any, draw: Any, area: float) -> Any:
    """The known mask, averaged in cells of the maps: what they could show at best, nearly."""
    return in_pixels(F.adaptive_avg_pool2d(masks[:, None].float(), CELLS)[:, 0], images)


def in_pixels(maps: Any, images: Any) -> Any:
    """Cells at the size of images, as `localize` has them."""
    return F.interpolate(maps[:, None], images.shape[-2:], mode="bilinear")[:, 0]


CONTROLS = {"whole image": whole, "centred square": centre, "random cells": noise, "grey values": grey,
            "known mask in cells": cells}  # fmt: skip
