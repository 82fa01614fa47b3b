"""'phishing': nine features of 1,250 web pages, and whether they are phishing (548).

They are in a Python package: pip install --no-deps river. Its file is read, none of its code runs.

Source: UCI Machine Learning Repository, Website Phishing; the table in the package river.
Columns: values (in the order of FEATURES), label.
"""

from __future__ import annotations

import csv
import gzip
from typing import Any

from .labeled import LabeledCorpus, file_of

FEATURES = (
    "empty_server_form_handler", "popup_window", "https", "request_from_other_domain", "anchor_from_other_domain",
    "is_popular", "long_url", "age_of_domain", "ip_in_url",
)  # fmt: skip


def make() -> Any:
    """One row for each page, in the order of the file."""
    from datasets import Dataset  # lazy: half a second

    file = file_of("phishing", "river", "datasets/phishing.csv.gz", "--no-deps river")
    with gzip.open(file, "rt", encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    values = [[float(row[name]) for name in FEATURES] for row in rows]
    return Dataset.from_dict({"values": values, "label": [int(row["is_phishing"]) for row in rows]})


CORPUS = LabeledCorpus(
    title="phishing",
    license="other",
    caveat="An old sample, whose features have two or three levels: no measure of what is phishing today.",
    source="the package river of PyPI",
    columns=("values", "label"),
    names=("legitimate", "phishing"),
    splits={"train": 1250},
    tasks=("tabular-classification",),
    make=make,
)
