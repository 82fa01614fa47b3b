"""'faces': 100 faces and 100 patches of background of Labeled Faces in the Wild, 25 x 25 pixels.

They are in a Python package: pip install --no-deps scikit-image. Its file is read, none of its code runs. There are no
identities: who is on a picture is not known, so that faces can be told from background, but not from each other.

Source: Huang et al. 2012, Learning to Align from Scratch; the sample in the package scikit-image.
Columns: image (values from 0 to 1 are rounded to 256 levels), label (face or not), the faces last.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .labeled import LabeledCorpus, file_of, pictures


def make() -> Any:
    """Backgrounds, then faces."""
    pixels = np.load(file_of("faces", "skimage", "data/lfw_subset.npy", "--no-deps scikit-image"))
    half = len(pixels) // 2
    levels = (pixels * 255).round().astype(np.uint8)
    return pictures(np.concatenate([levels[half:], levels[:half]]), [0] * (len(pixels) - half) + [1] * half)


CORPUS = LabeledCorpus(
    title="faces",
    license="other",
    caveat="Photographs of people in the news, without names: for tests of methods, not for any use on people.",
    source="the package scikit-image of PyPI",
    columns=("image", "label"),
    names=("background", "face"),
    splits={"train": 200},
    tasks=("image-classification",),
    make=make,
)
