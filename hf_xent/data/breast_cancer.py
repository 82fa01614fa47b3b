"""'breast_cancer': 30 measures of the nuclei of cells in 569 biopsies, and whether the tumour is benign (357).

Source: Street, Wolberg, Mangasarian 1993, Nuclear feature extraction for breast tumor diagnosis; scikit-learn's
`load_breast_cancer`, which names the features.
Columns: values, label.
"""

from __future__ import annotations

from typing import Any

from .labeled import LabeledCorpus


def make() -> Any:
    """One row for each biopsy, in scikit-learn's order."""
    from datasets import Dataset  # lazy: half a second
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    return Dataset.from_dict({"values": found.data, "label": found.target})


CORPUS = LabeledCorpus(
    title="breast_cancer",
    license="other",
    caveat="A set on which linear models are nearly perfect: differences of a point are a few rows.",
    source="the package scikit-learn",
    columns=("values", "label"),
    names=("malignant", "benign"),
    splits={"train": 569},
    tasks=("tabular-classification",),
    make=make,
)
