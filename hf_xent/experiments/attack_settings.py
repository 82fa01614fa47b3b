"""The settings of attacks on a classifier."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..robust import ATTACKS
from .class_settings import DATA_HELP
from .fields import option

BETWEEN = re.compile(r",\s*(?![\w.]+\s*=)(?=[a-z_])")
"""The comma between two attacks: no option follows it."""


@dataclass(frozen=True)
class Attacking:
    """All settings of attacks on a classifier; each field is an option of `hf-xent attack`."""

    model: str = option("A trained classifier of images or texts: a folder, or a Hub id.", "")
    dataset: str = option(DATA_HELP, "")
    method: str = option(
        f"The attack, or several with commas, with options if any, such as 'pgd:size=2': {ATTACKS.names()}.", "pgd"
    )
    epsilon: str = option(
        "How far an input may be moved, such as 8/255 or 0.1. Of pixels from 0 to 1; of texts, by the root mean square"
        " of the embeddings, or for the norm '2' by their mean length.",
        "8/255",
    )
    steps: int = option("Forward and backward passes of a row, at most.", 100, min=1)
    norm: str = option("'inf', the largest change of a number, or '2', the length of the change.", "inf")
    split: str | None = None  # of the data set, such as 'test[:1000]'
    limit: int | None = option("Rows that are attacked, drawn at random by the seed [default: all].", None, min=1)
    task: str = option("What is classified: text, image, or auto for what the columns tell.", "auto")
    column: str | None = option(
        "The column that is classified, or two with a comma for a pair of texts [default: text or image].", None
    )
    label: str | None = option("The column of labels [default: label, labels or target].", None)
    max_length: int | None = option("Tokens that are kept of a text, from its start [default: 256].", None, min=2)
    batch_size: int = option("Rows that are attacked together.", 64, min=1)
    seed: int = option("Seed of the random starts, and of the rows of --limit.", 0, min=0, max=2**32 - 1)
    dtype: str = "float32"  # of the model
    masking: bool = option(
        "Look for signs of gradient masking too, which makes a model seem more robust than it is.", False
    )
    keep_inputs: bool = option("Write the changed inputs too, as safetensors.", False)
    output: str = option("Folder for rows.csv, results.json and what is kept of the inputs.", "out/attack")

    @property
    def methods(self) -> tuple[str, ...]:
        """The attacks, each of them once. Raises: ValueError if none is named."""
        names = tuple(dict.fromkeys(name for part in BETWEEN.split(self.method) if (name := part.strip(" ,"))))
        if not names:
            raise ValueError(f"method is {self.method!r}: name an attack, of {ATTACKS.names()}")
        return names

    @property
    def radius(self) -> float:
        """Epsilon as a number. Raises: ValueError unless it is a number above 0, or a fraction of two."""
        parts = self.epsilon.split("/")
        try:
            above, below = float(parts[0]), float(parts[1]) if len(parts) == 2 else 1.0
            radius = above / below
        except (ValueError, ZeroDivisionError):
            radius = -1.0
        if len(parts) > 2 or not 0 < radius < float("inf"):
            raise ValueError(f"epsilon is {self.epsilon!r}: choose a number above 0, such as 0.1 or 8/255")
        return radius

    def check(self) -> None:
        """Raises: ValueError for options that cannot be used, before any data are read."""
        from ..robust import get
        from ..robust.ball import Ball

        for name in ("model", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"{name} is not given: name one{' with --dataset' if name == 'dataset' else ''}")
        Ball(self.radius, self.norm)
        for method in self.methods:
            get(method)
        if self.task not in ("auto", "text", "image"):
            raise ValueError(f"task is {self.task!r}: choose auto, text or image")
        if Path(self.output).exists() and not Path(self.output).is_dir():
            raise ValueError(f"output is {self.output}, which is a file: name a folder")

    def of_one(self, method: str) -> dict[str, Any]:
        """What the result of one attack depends on, beside the model and the rows."""
        names = ("steps", "norm", "batch_size", "seed", "dtype", "keep_inputs")
        return {"method": method, "epsilon": self.radius, **{name: getattr(self, name) for name in names}}
