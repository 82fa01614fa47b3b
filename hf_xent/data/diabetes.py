"""'diabetes': ten measures of 442 people with diabetes, and the progression of the disease a year later, a number.

Source: Efron et al. 2004, Least Angle Regression, Annals of Statistics 32(2); scikit-learn's `load_diabetes` before it
scales the features.
Columns: values (age, sex, body mass index, blood pressure, six of the serum), label (from 25 to 346).
"""

from __future__ import annotations

from typing import Any

from .labeled import LabeledCorpus


def make() -> Any:
    """One row for each person, in scikit-learn's order."""
    from datasets import Dataset  # lazy: half a second
    from sklearn.datasets import load_diabetes

    found = load_diabetes(scaled=False)
    return Dataset.from_dict({"values": found.data, "label": found.target})


CORPUS = LabeledCorpus(
    title="diabetes",
    license="other",
    caveat="442 people of one study: an error of a part of them depends much on which part it is.",
    source="the package scikit-learn",
    columns=("values", "label"),
    splits={"train": 442},
    tasks=("tabular-regression",),
    make=make,
)
