"""Handwritten zeros on photographs, with the ring around them and their mask, for landmarks.py.

    rows = Zeros(digits("train")[:320], photographs(), target="rings", hide=0.5)         a data set for a Trainer

The 500 zeros of MNIST (400 for training) are enlarged to 48 x 48 pixels. A row pastes one at a random place of a random
crop, 64 x 64, of a photograph (brick, grass, gravel), each time anew; `fixed` rows are the same in every run. A square
is erased by the mean of the image; its centre is a random landmark.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_xent import data
from hf_xent.data.labeled import file_of
from hf_xent.metrics.contours import contour, fill

SIZE, SIDE, POINTS, LEVEL = 64, 48, 40, 0.3
TEXTURES = ("brick", "grass", "gravel")


def photographs() -> list[np.ndarray]:
    """Grey images [H, W], from 0 to 1, of the package scikit-image."""
    files = (file_of("landmarks", "skimage", f"data/{name}.png", "--no-deps scikit-image") for name in TEXTURES)
    return [np.asarray(Image.open(file).convert("L"), np.float32) / 255 for file in files]


def digits(split: str, digit: int = 0) -> list[np.ndarray]:
    """The brightness [48, 48] of enlarged digits, from 0 to 1."""
    rows = data.load("mnist", split=split)
    kept = [i for i, label in enumerate(rows["label"]) if label == digit]
    large = (rows[i]["image"].resize((SIDE, SIDE), Image.Resampling.BICUBIC) for i in kept)
    return [np.asarray(image, np.float32) / 255 for image in large]


class Zeros:
    """Rows of pixel_values [1, 64, 64] and labels: a mask [64, 64] of ids, or points from 0 to 1.

    Args:
        digits: What is pasted.
        photographs: What it is pasted on.
        target: 'rings' of 40 points, 'outlines' of 400, or 'masks'.
        hide: The share of the rows of which a square is erased.
        sides: The smallest and the largest side of the square, in pixels.
        fixed: Whether a row is always the same.
    """

    def __init__(self, digits: list[Any], photographs: list[Any], target: str, hide: float = 0.0,
                 sides: tuple[int, int] = (8, 28), fixed: bool = False):  # fmt: skip
        self.digits, self.photographs, self.target, self.hide = digits, photographs, target, hide
        self.sides, self.fixed = sides, fixed
        self.shapes = [(contour(x, POINTS, LEVEL), contour(x, 400, LEVEL)) for x in digits]

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, i: int) -> dict[str, Any]:
        draw = np.random.default_rng(i if self.fixed else torch.randint(2**31, ()).item())
        photograph = self.photographs[draw.integers(len(self.photographs))]
        y, x = (int(draw.integers(side - SIZE + 1)) for side in photograph.shape)
        top, left = (int(v) for v in draw.integers(SIZE - SIDE + 1, size=2))
        image = photograph[y : y + SIZE, x : x + SIZE].astype(np.float32)
        part = image[top : top + SIDE, left : left + SIDE]
        part += self.digits[i] * (1 - part)
        ring, outline = (shape + np.array([left, top]) for shape in self.shapes[i])
        centre, side = ring[draw.integers(POINTS)], draw.integers(*self.sides, endpoint=True)
        if draw.random() < self.hide:
            (a, c), (b, d) = (np.clip(centre + sign * side / 2, 0, SIZE).round().astype(int) for sign in (-1, 1))
            image[c:d, a:b] = image.mean()
        shape = {"rings": ring / SIZE, "outlines": outline / SIZE}.get(self.target)
        label = torch.from_numpy(fill(outline, (SIZE, SIZE))).long() if shape is None else torch.tensor(shape).float()
        return {"pixel_values": torch.from_numpy(image[None] * 2 - 1), "labels": label}

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))
